"""How far a run has come, and what is refused as no such record."""

from __future__ import annotations

from typing import Any

import pytest

from megatron.train.state import Progress
from megatron.utils.errors import CheckpointError


def test_round_trip() -> None:
    progress = Progress()
    for _ in range(3):
        progress.advance(8, 1024)
    assert progress == Progress(step=3, consumed_samples=24, consumed_tokens=3072)
    assert Progress.from_dict({**progress.to_dict(), "more": "words"}, "somewhere") == progress


@pytest.mark.parametrize(
    "state", [{}, {"step": 3, "consumed_samples": 4}, {"step": 1, "consumed_samples": "many", "consumed_tokens": 1}]
)
def test_missing_parts_are_named(state: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError) as caught:
        Progress.from_dict(state, "runs/x/step_0000003")
    message = str(caught.value)
    missing = [name for name in Progress().to_dict() if not isinstance(state.get(name), int)]
    assert "runs/x/step_0000003" in message and all(name in message for name in missing)
    assert "model.init_from" in message
