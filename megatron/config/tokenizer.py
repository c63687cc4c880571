"""The `tokenizer` section: which tokenizer the data was made with."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.key import key


@dataclass(frozen=True)
class TokenizerConfig:
    """Used to check that the data fits, and copied into checkpoints."""

    path: str | None = key(
        None,
        "A tokenizer.model or tokenizer.json, or a folder or hf:// address that holds one. "
        "null: that of the model folder, if it has one.",
    )
