"""Data between the stages: tiles, pixels, ground truth, embeddings, results of queries."""
