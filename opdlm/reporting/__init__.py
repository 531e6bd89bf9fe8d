"""Tables, plots, pages and model cards."""
