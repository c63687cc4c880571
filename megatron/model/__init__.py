"""The Llama decoder: configuration, blocks, one pipeline stage of it, initialisation and FLOP counts."""
