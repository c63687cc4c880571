"""The optimizer: AdamW on flat ranges, gradient clipping and learning-rate schedules."""
