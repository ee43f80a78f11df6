"""Ways to find the directions that tell harmful from harmless requests, one a file."""
