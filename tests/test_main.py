"""The command line's shell: verbs, messages and exit codes, with stand-in verbs and in real processes."""

from __future__ import annotations

import argparse
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from types import ModuleType

import pytest

import megatron
from megatron.__main__ import VERBS, main
from megatron.utils.errors import DataError, MegatronError, ResourceError

MODULE = [sys.executable, "-m", "megatron"]


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes `train` a stand-in that runs the given function."""

    def install(run: Callable[[argparse.Namespace], int], takes_overrides: bool = False) -> None:
        module = ModuleType("megatron.commands.train")
        module.HELP = "a stand-in"
        module.TAKES_OVERRIDES = takes_overrides
        module.add_arguments = lambda parser: parser.add_argument("--config")
        module.run = run
        monkeypatch.setitem(sys.modules, "megatron.commands.train", module)

    return install


@pytest.fixture(autouse=True)
def as_before_sigterm() -> Iterator[None]:
    """What an end under torchrun makes of SIGTERM is for that process alone."""
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


def fail_with(error: BaseException) -> Callable[[argparse.Namespace], int]:
    def run(arguments: argparse.Namespace) -> int:
        raise error

    return run


def test_a_verb_gets_its_arguments_and_gives_the_exit_code(verb: Callable[..., None]) -> None:
    seen = []

    def run(arguments: argparse.Namespace) -> int:
        seen.append(arguments)
        return 3

    verb(run)
    assert main(["train", "--config", "x"]) == 3
    assert seen == [argparse.Namespace(config="x")]


def test_overrides_are_handed_over_where_they_are_taken(verb: Callable[..., None]) -> None:
    seen = []

    def run(arguments: argparse.Namespace) -> int:
        seen.append((arguments.config, arguments.overrides))
        return 0

    verb(run, takes_overrides=True)
    assert main(["train", "--train.steps", "5", "--config", "x", "--log.dir=y"]) == 0
    assert seen == [("x", ["--train.steps", "5", "--log.dir=y"])]


def test_elsewhere_they_are_unknown_arguments(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(fail_with(AssertionError("must not run")))
    assert main(["train", "--train.steps", "5"]) == 2
    assert "megatron train: error: unrecognized arguments: --train.steps 5; see megatron train --help" in (
        capsys.readouterr().err
    )


@pytest.mark.parametrize("words", [["--conf", "x"], ["--config"], ["stray"]])
def test_options_are_never_guessed(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert main(["train", *words, "--data.train=synthetic"]) == 2
    expected = "argument --config: expected one" if words == ["--config"] else f"unrecognized arguments: {words[0]}"
    assert capsys.readouterr().err.startswith(f"megatron train: error: {expected}")


def test_an_unrecognized_option_hides_no_problem_of_the_configuration(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--tensor", "2", "--train.stepz", "3", "--parallel.pipeline", "7"]) == 2
    said = capsys.readouterr().err
    for problem in (
        "the configuration has 4 problems",
        "unrecognized arguments: --tensor 2; see megatron train --help",
        "did you mean train.steps",
        "1 processes cannot be divided by parallel.tensor=1 x parallel.pipeline=7",
        "data.train is not set",
    ):
        assert problem in said
    assert main(["train", "--tensor", "2", "--config", "nowhere.yaml"]) == 2
    said = capsys.readouterr().err
    assert "unrecognized arguments: --tensor 2" in said and "no configuration file nowhere.yaml" in said


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        ([], "no verb given; use one of preprocess, "),
        (["trian"], "unknown verb 'trian'; did you mean train?"),
        (["--config"], "unknown option '--config'; the verb comes first"),
        (["xyz"], "the verbs are preprocess"),
    ],
)
def test_an_unknown_verb_names_the_nearest(words: list[str], hint: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("megatron: error: ")
    assert hint in captured.err
    assert captured.out == ""


def test_an_error_of_the_user_is_a_message(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(fail_with(DataError("x.bin is 7 bytes short")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == "megatron train: error: x.bin is 7 bytes short\n"


@pytest.mark.parametrize(
    ("error", "local_rank", "says"),
    [
        (DataError("x.bin is 7 bytes short"), "0", True),
        (DataError("x.bin is 7 bytes short"), "1", False),
        (ResourceError("x.bin is 7 bytes short"), "1", True),
    ],
)
def test_under_torchrun_it_is_said_once_per_machine(
    verb: Callable[..., None],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: MegatronError,
    local_rank: str,
    says: bool,
) -> None:
    for name, value in (("RANK", "5"), ("WORLD_SIZE", "8"), ("LOCAL_RANK", local_rank), ("LOCAL_WORLD_SIZE", "4")):
        monkeypatch.setenv(name, value)
    verb(fail_with(error))
    assert main(["train"]) == 2
    assert ("7 bytes short" in capsys.readouterr().err) is says
    assert main(["train", "--stray"]) == 2
    assert ("unrecognized arguments" in capsys.readouterr().err) is (local_rank == "0")


def test_broken_launch_variables_are_an_error_too(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", "5")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert main(["--help"]) == 2
    assert "megatron: error: the launcher set RANK=5 but not WORLD_SIZE" in capsys.readouterr().err


def test_interruption_is_one_line(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(fail_with(KeyboardInterrupt()))
    assert main(["train"]) == 130
    assert capsys.readouterr().err == "megatron train: interrupted\n"


def test_a_full_disk_is_a_message(verb: Callable[..., None], capsys: pytest.CaptureFixture[str]) -> None:
    verb(fail_with(OSError(errno.ENOSPC, "No space left on device", "/saves/x")))
    assert main(["train"]) == 2
    assert capsys.readouterr().err == (
        "megatron train: error: No space left on device: /saves/x; free some space there, or name another folder\n"
    )
    verb(fail_with(PermissionError(errno.EACCES, "Permission denied")))
    assert main(["train"]) == 2
    assert "error: Permission denied; name a place" in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [ValueError("a bug"), FileNotFoundError(errno.ENOENT, "No such file", "x"), BrokenPipeError()]
)
def test_bugs_keep_their_traceback(verb: Callable[..., None], error: Exception) -> None:
    verb(fail_with(error))
    with pytest.raises(type(error)):
        main(["train"])


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"megatron-med {megatron.__version__}\n"


@pytest.mark.parametrize("words", [["--help"], *([name, "--help"] for name in VERBS)], ids=" ".join)
def test_help_needs_nothing_heavy(words: list[str]) -> None:
    program = (
        "import sys\nfrom megatron.__main__ import main\n"
        "try:\n    main(sys.argv[1:])\n"
        "except SystemExit as end:\n    assert end.code == 0\n"
        "heavy = {'torch', 'numpy', 'transformers', 'yaml', 'sentencepiece', 'tokenizers'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    shown = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("usage: megatron")
    if words == ["--help"]:
        assert all(f"\n  {name} " in shown.stdout for name in VERBS)


def test_help_is_instant() -> None:
    def seconds() -> float:
        start = time.monotonic()
        subprocess.run([*MODULE, "--help"], capture_output=True, check=True)
        return time.monotonic() - start

    # The best of a few: what is measured is the program, not what else the machine does.
    assert min(seconds() for _ in range(5)) < 0.5


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_nobody_reads_the_output_any_more(unbuffered: str) -> None:
    # It writes into a pipe whose reader has gone, at once or when it flushes.
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    process = subprocess.Popen([*MODULE, "--version"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environment)
    assert process.stdout is not None
    process.stdout.close()
    _, errors = process.communicate()
    assert (process.returncode, errors) == (141, b"")
