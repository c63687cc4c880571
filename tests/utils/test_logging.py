"""Messages go to stderr in plain lines, and ranks other than 0 only speak up when something is wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from megatron.utils.logging import configure_logging, get_logger


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    root = logging.getLogger("megatron")
    level, handlers = root.level, list(root.handlers)
    yield
    root.setLevel(level)
    root.handlers[:] = handlers


def spoken(capsys: pytest.CaptureFixture[str], rank: int) -> str:
    configure_logging(rank)
    logger = get_logger("megatron.train.trainer")
    logger.debug("detail")
    logger.info("step %d", 3)
    logger.warning("slow")
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_rank_0_tells_the_story(capsys: pytest.CaptureFixture[str]) -> None:
    assert spoken(capsys, 0) == "step 3\nwarning: slow\n"


def test_other_ranks_tell_what_is_wrong_and_who_they_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert spoken(capsys, 3) == "rank 3: warning: slow\n"


def test_configuring_again_replaces(capsys: pytest.CaptureFixture[str]) -> None:
    configure_logging(1)
    configure_logging(0)
    assert spoken(capsys, 0) == "step 3\nwarning: slow\n"


def test_every_logger_is_below_ours() -> None:
    assert get_logger("megatron.data").name == "megatron.data"
    assert get_logger("quickstart").name == "megatron.quickstart"
    assert get_logger("megatronic").name == "megatron.megatronic"
