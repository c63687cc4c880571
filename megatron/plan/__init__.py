"""What a run will need and how long it will take, from the real step on tensors without storage."""
