"""Instruction data: conversations whose tokens have roles, from JSON lines to batches with a loss on the answers."""
