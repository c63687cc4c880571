"""What the tests of the tools share."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable

import pytest
import torch

from tools.megatron_llm_flags import run_tool

Tool = Callable[..., str]


@pytest.fixture(autouse=True)
def one_thread() -> object:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def tool(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Tool:
    """Runs a command line of one of the tools in this process; what it writes. `code` is the right exit code."""

    def run(module: object, line: str, code: int = 0) -> str:
        monkeypatch.setattr(sys, "argv", [f"{module.__name__.rpartition('.')[2]}.py", *shlex.split(line)])
        found = run_tool(module.words_of_verb, getattr(module, "finish", None))
        captured = capfd.readouterr()
        assert found == code, captured.err
        return captured.out + captured.err

    return run
