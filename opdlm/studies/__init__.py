"""`opdlm study`: grids of small trainings that test published claims. Only `cli` imports it."""
