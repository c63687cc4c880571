"""Measuring a model: the mean loss over token streams."""
