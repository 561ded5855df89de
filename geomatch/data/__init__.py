"""What was cut: the tile catalogue, its pixels, what counts as a match, and batches of it."""
