"""What the launcher's variables mean, and that half a set of them is an error."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from megatron.utils.environment import Launch, read_launch
from megatron.utils.errors import ConfigError

NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def launch(monkeypatch: pytest.MonkeyPatch, *values: str | None) -> Launch:
    for name, value in zip(NAMES, values, strict=True):
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    return read_launch()


def test_without_a_launcher_there_is_one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch(monkeypatch, None, None, None, None)
    assert found == Launch(rank=0, world_size=1, local_rank=0, local_world_size=1)
    assert not found.distributed


def test_the_launchers_variables_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    found = launch(monkeypatch, "9", "16", "1", "8")
    assert found == Launch(rank=9, world_size=16, local_rank=1, local_world_size=8)
    assert found.distributed


@pytest.mark.parametrize(
    ("values", "hint"),
    [
        (("0", None, None, None), "set RANK=0 but not WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE"),
        (("0", "2", None, "2"), "but not LOCAL_RANK"),
        (("x", "2", "0", "2"), "RANK='x' is not a whole number"),
        (("-1", "2", "0", "2"), "RANK='-1' is not a whole number"),
        (("2", "2", "0", "2"), "contradict each other: RANK=2, WORLD_SIZE=2"),
        (("0", "2", "2", "2"), "contradict"),
        (("0", "2", "0", "4"), "contradict"),
    ],
)
def test_what_cannot_be_is_an_error(monkeypatch: pytest.MonkeyPatch, values: tuple[str | None, ...], hint: str) -> None:
    with pytest.raises(ConfigError) as caught:
        launch(monkeypatch, *values)
    assert hint in str(caught.value)
    assert "torchrun" in str(caught.value)


def test_the_age_of_the_process_is_counted_from_its_start() -> None:
    code = (
        "import sys, time; time.sleep(0.3); from megatron.utils.environment import process_age_s as age; print(age())"
    )
    began = time.monotonic()
    age = float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert 0.25 < age < time.monotonic() - began + 0.05
