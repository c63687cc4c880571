"""Megatron-LLM's command line: which flags it has, what each means here, and what they mean together."""

from __future__ import annotations
