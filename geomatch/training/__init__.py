"""The rooms of `geomatch.train`: setup, rounds, batches and mining."""
