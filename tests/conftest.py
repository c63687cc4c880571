"""Fixtures that every test may use, and the rule that no test talks to the network."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Set at import, before any test module imports transformers; inherited by the processes that tests start.
os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_OFFLINE="1", WANDB_MODE="offline")

# The same examples each time, and no deadline: a busy machine is no failure.
settings.register_profile("reproducible", derandomize=True, deadline=None)
settings.load_profile("reproducible")


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of facts and real data beside the repository; tests that need it skip where it is absent."""
    folder = Path(__file__).resolve().parents[2] / "shared"
    if not folder.is_dir():
        pytest.skip("needs the real data in ../shared, which is not there")
    return folder
