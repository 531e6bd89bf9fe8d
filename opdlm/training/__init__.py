"""The training engine that conversion and text training share."""
