"""`megatron VERB` and `python -m megatron VERB`: finds the verb, runs it, and turns errors into messages.

Exit codes: what the verb returns; 2 for an error that the user can mend, with a message and no traceback; 130 after
Ctrl-C. Anything else that escapes is a bug and keeps its traceback.

Under torchrun every process runs this. An error is said once: by rank 0 where the ranks have agreed on it (as `train`
and `evaluate` do once they are connected), by the process that met it where no other did, else by the first of each
machine.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import importlib
import os
import select
import signal
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from types import FrameType, ModuleType
from typing import NoReturn

import megatron
from megatron.utils.environment import read_launch
from megatron.utils.errors import ConfigError, MegatronError
from megatron.utils.logging import configure_logging

VERBS = (
    "preprocess",
    "merge",
    "dataset",
    "convert",
    "diff",
    "train",
    "evaluate",
    "inspect",
    "plan",
    "verify",
    "schedule",
    "doctor",
)

USER_ERROR = 2
INTERRUPTED = 130
BROKEN_PIPE = 141

# What the machine refuses, whatever the program does. Others (no such file, …) have to be foreseen where they arise.
_MACHINE_ERRORS = {
    errno.ENOSPC: "free some space there, or name another folder",
    errno.EDQUOT: "free some space there, or name another folder",
    errno.EACCES: "name a place that this user may use",
    errno.EPERM: "name a place that this user may use",
    errno.EROFS: "name a place that can be written",
    errno.EFBIG: "raise the limit on file sizes (ulimit -f)",
    errno.EMFILE: "raise the limit on open files (ulimit -n)",
    errno.ENFILE: "raise the machine's limit on open files",
    errno.EIO: "check the disk",
}


# How long a process that has nothing to say waits before it ends.
_HEAD_START_S = 2.0


class _Parser(argparse.ArgumentParser):
    """An argument parser whose errors are ours: one message, said once also under torchrun."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see {self.prog} --help")


def main(words: Sequence[str] | None = None, translate: Callable[[Sequence[str]], list[str]] | None = None) -> int:
    """Run the command line (None: the process's own) and return the exit code.

    `translate` is for programs with words of their own: it makes words for `megatron` of them, and errors bear the
    program's name.
    """
    words = list(sys.argv[1:] if words is None else words)
    program = f"megatron {words[0]}" if words and words[0] in VERBS else "megatron"
    program = Path(sys.argv[0]).name if translate is not None else program
    try:
        configure_logging(read_launch().rank)
        code = _run(words if translate is None else translate(words))
        sys.stdout.flush()
        return code
    except MegatronError as error:
        if _is_speaker(error):
            _say(program, f"error: {error}")
            _wait_for_the_late()
        else:
            _wait_for_the_speaker()
        return USER_ERROR
    except KeyboardInterrupt:
        if _is_first_of_machine():
            _say(program, "interrupted")
        return INTERRUPTED
    except OSError as error:
        if isinstance(error, BrokenPipeError) and _reader_left():
            return BROKEN_PIPE
        if error.errno not in _MACHINE_ERRORS:
            raise
        # Any process may meet this alone, so each says it.
        _say(program, f"error: {_describe(error)}; {_MACHINE_ERRORS[error.errno]}")
        return USER_ERROR


def _run(words: list[str]) -> int:
    if words and words[0] in ("-h", "--help"):
        sys.stdout.write(_help())
        return 0
    if words and words[0] == "--version":
        sys.stdout.write(f"megatron-med {megatron.__version__}\n")
        return 0
    if not words:
        raise ConfigError(f"no verb given; use one of {', '.join(VERBS)}; see megatron --help")
    if words[0] not in VERBS:
        raise ConfigError(_unknown_verb(words[0]))
    return _run_verb(words[0], words[1:])


def _run_verb(verb: str, words: list[str]) -> int:
    command = _command(verb)
    takes_overrides = getattr(command, "TAKES_OVERRIDES", False)
    parser = _Parser(prog=f"megatron {verb}", description=command.HELP, allow_abbrev=False)
    overrides: list[str] = []
    if takes_overrides:
        from megatron.config.overrides import split_overrides

        parser.epilog = "Any key of the configuration can be given as --section.key VALUE: see docs/configuration.md."
        overrides, words = split_overrides(words)
    command.add_arguments(parser)
    arguments, unrecognized = parser.parse_known_args(words)
    if takes_overrides:
        arguments.overrides, arguments.unrecognized = overrides, unrecognized
    elif unrecognized:
        parser.error(f"unrecognized arguments: {' '.join(unrecognized)}")
    return int(command.run(arguments))


def _command(verb: str) -> ModuleType:
    return importlib.import_module(f"megatron.commands.{verb}")


def _help() -> str:
    lines = "".join(f"  {verb:<12}{_command(verb).HELP}\n" for verb in VERBS)
    return (
        "usage: megatron VERB ...\n\n"
        "Continue pretraining Llama models: tensor, context, pipeline and data parallel, Hugging Face in and out.\n\n"
        f"verbs:\n{lines}\n"
        "options:\n"
        "  -h, --help  show this; megatron VERB --help shows a verb's options\n"
        "  --version   show the version\n"
    )


def _unknown_verb(word: str) -> str:
    if word.startswith("-"):
        return f"unknown option {word!r}; the verb comes first: megatron VERB ...; see megatron --help"
    guess = difflib.get_close_matches(word, VERBS, n=1)
    hint = f"did you mean {guess[0]}?" if guess else f"the verbs are {', '.join(VERBS)}"
    return f"unknown verb {word!r}; {hint}"


def _is_first_of_machine() -> bool:
    try:
        return read_launch().local_rank == 0
    except ConfigError:
        return True  # the launcher's variables are what is wrong


def _wait_for_the_speaker() -> None:
    """Let the process that speaks be the first to end.

    Once one has ended, torchrun ends the others with SIGTERM. They end with the code of the error all the same: in
    torchrun's report they would else pass for processes that were killed.
    """
    signal.signal(signal.SIGTERM, _end_now)
    try:
        time.sleep(_HEAD_START_S)
    finally:
        _stay_through_sigterm()


def _wait_for_the_late() -> None:
    """Having spoken, leave the other processes of the launch the time to meet the same error."""
    if not _is_alone():
        _stay_through_sigterm()
        time.sleep(_HEAD_START_S / 4)


def _end_now(number: int, frame: FrameType | None) -> NoReturn:
    sys.exit(USER_ERROR)


def _stay_through_sigterm() -> None:
    """Let SIGTERM change nothing about the exit code any more. A handler would be gone before Python's own end is."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _is_alone() -> bool:
    try:
        return not read_launch().distributed
    except ConfigError:
        return True  # the launcher's variables are what is wrong


def _is_speaker(error: MegatronError) -> bool:
    """Whether this process is the one that says an error which others may have met as well."""
    if error.met_by == "world":
        return read_launch().rank == 0
    return error.met_by == "process" or _is_first_of_machine()


def _reader_left() -> bool:
    """Whether it is our standard output that nobody reads any more (`megatron inspect X | head`)."""
    try:
        output = sys.stdout.fileno()
    except OSError:
        return False  # no file, as when output is captured
    poll = select.poll()
    poll.register(output, 0)
    if not any(event & (select.POLLERR | select.POLLHUP) for _, event in poll.poll(0)):
        return False
    # Python flushes once more at exit; what is left goes nowhere.
    os.dup2(os.open(os.devnull, os.O_WRONLY), output)
    return True


def _describe(error: OSError) -> str:
    where = ", ".join(str(name) for name in (error.filename, error.filename2) if name is not None)
    return f"{error.strerror}: {where}" if where else str(error.strerror)


def _say(program: str, text: str) -> None:
    sys.stderr.write(f"{program}: {text}\n")


if __name__ == "__main__":
    sys.exit(main())
