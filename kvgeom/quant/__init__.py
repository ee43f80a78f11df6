"""How keys and values are rounded: schemes, recipes, placements, and the tensor functions."""
