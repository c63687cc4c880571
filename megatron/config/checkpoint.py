"""The `checkpoint` section: what is saved where, and what a run starts from."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.key import key


@dataclass(frozen=True)
class CheckpointConfig:
    """A start takes the newest whole checkpoint in `save`; else `load`; else model.init_from; else random weights."""

    save: str | None = key(None, "Folder for checkpoints (SAVE/step_0000100/, SAVE/latest). null: nothing is saved.")
    load: str | None = key(None, "Checkpoint to start from with all its state, when `save` holds none yet.")
    interval: int | None = key(None, "Steps between checkpoints. null: only at the end.", minimum=1)
    keep_last: int | None = key(None, "How many checkpoints to keep; older ones are deleted. null: all.", minimum=1)
