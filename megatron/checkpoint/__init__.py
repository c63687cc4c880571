"""Weights and training state on disk: reading, saving, resharding and converting them."""
