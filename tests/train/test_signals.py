"""The wish to stop: who makes it, and that it leaves nothing behind."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from megatron.train import signals
from megatron.train.signals import StopWish


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_a_wish(number: signal.Signals) -> None:
    before = signal.getsignal(number)
    with StopWish(None) as wish:
        assert not wish.wanted(1)
        os.kill(os.getpid(), number)
        assert wish.wanted(1) and number.name in wish.reason
        assert wish.wanted(1), "it stays wanted"
    assert signal.getsignal(number) is before


def test_the_stop_file_is_heard_and_removed(tmp_path: Path) -> None:
    stop = tmp_path / "STOP"
    with StopWish(stop) as wish:
        assert not wish.wanted(1)
        stop.touch()
        assert wish.wanted(1) and str(stop) in wish.reason
        assert not stop.exists(), "the next start must not stop at once"
        assert wish.wanted(1)


def test_a_stop_file_that_cannot_be_removed_is_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    stop = tmp_path / "STOP"
    stop.mkdir()  # a folder cannot be unlinked
    with StopWish(stop) as wish, caplog.at_level("WARNING"):
        assert wish.wanted(1)
    assert str(stop) in caplog.text


def test_a_ctrl_c_that_is_passed_on_is_one_wish_and_a_later_one_means_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopWish(None) as wish:
        for _ in range(3):  # the terminal's, and the launcher's for each process
            os.kill(os.getpid(), signal.SIGINT)
            now[0] += 1.0
        assert wish.wanted(1)
        now[0] += 60.0
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_a_repeated_sigterm_is_no_hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [50.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    with StopWish(None) as wish:
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGTERM)
            now[0] += 60.0
        assert wish.wanted(1)


def test_an_interval_and_a_time_are_wishes(monkeypatch: pytest.MonkeyPatch) -> None:
    wish = StopWish(None, exit_interval=3)
    assert not wish.wanted(2) and not wish.wanted(4) and wish.wanted(6)
    assert wish.reason == "train.exit_interval=3"
    now = [500.0]
    monkeypatch.setattr(signals.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(signals, "process_age_s", lambda: 60.0)
    wish = StopWish(None, exit_minutes=2.5)
    now[0] += 89
    assert not wish.wanted(1), "the minute before counts"
    now[0] += 2
    assert wish.wanted(1) and wish.reason == "train.exit_minutes=2.5 are over"
