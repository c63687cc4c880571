"""Parallelism: the mesh of ranks, collectives, parallel layers, gradient buckets and the pipeline."""
