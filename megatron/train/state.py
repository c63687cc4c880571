"""How far a run has come: all that a checkpoint keeps beside weights and optimizer state."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from megatron.utils.errors import CheckpointError


@dataclass
class Progress:
    """`step` steps are done, which read the first `consumed_samples` samples of the order: `consumed_tokens` inputs."""

    step: int = 0
    consumed_samples: int = 0
    consumed_tokens: int = 0

    def advance(self, samples: int, tokens: int) -> None:
        """One more step, of this many sequences with so many input tokens in all."""
        self.step += 1
        self.consumed_samples += samples
        self.consumed_tokens += tokens

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    @classmethod
    def from_dict(cls, state: Mapping[str, Any], origin: str) -> Progress:
        """Read what `to_dict` gave; raises CheckpointError, naming `origin`, where a part is missing."""
        missing = [field.name for field in fields(cls) if not isinstance(state.get(field.name), int)]
        if missing:
            raise CheckpointError(
                f"{origin} holds no training state ({', '.join(missing)}): it is a model, not a run's checkpoint. "
                "To start a new run from its weights, give it as model.init_from."
            )
        return cls(**{field.name: state[field.name] for field in fields(cls)})
