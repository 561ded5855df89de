"""Where things are: the ground grid, rasters, labels and footprints."""
