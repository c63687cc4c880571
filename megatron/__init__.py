"""Megatron-style training of Llama models: a checkpoint and a corpus in, a better checkpoint out."""

__version__ = "0.1.0"
