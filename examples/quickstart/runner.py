"""Runs commands one after the other: echoes each as it can be typed, keeps its output, stops at a failure.

It owns processes, the folder of results and the words on the terminal. It must not know what the commands do.
"""

from __future__ import annotations

import fcntl
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import IO, NoReturn, TextIO

WIDTH = 116
LAST_LINES = 15
# Where torchrun begins its own report on workers that failed; what they said themselves comes before it.
LAUNCHER_REPORT = r"torch/distributed/elastic.*failed \(exitcode"
GRACE_S = 20.0  # time to finish a training step and save
MARKER = ".made-by-quickstart"


class QuickstartError(Exception):
    """Something that the user can mend; its text is all that is shown."""


@dataclass(frozen=True)
class Command:
    """One command: what it is for, its words, where its standard output goes, and which of its lines to show."""

    title: str
    words: tuple[str, ...]
    output: str | None = None
    show: str = "."

    @property
    def text(self) -> str:
        """The command on one line, as a shell takes it."""
        return shlex.join(self.words) + (f" > {shlex.quote(self.output)}" if self.output else "")

    @property
    def wrapped(self) -> str:
        """The command on lines that a terminal shows whole; a shell takes them as they are."""
        positional, *options = re.split(r" (?=--|>)", self.text)
        lines = [""]
        for part in (*positional.split(" "), *options):
            if lines[-1] and len(lines[-1]) + len(part) > WIDTH - 6:
                lines.append("    " + part)
            else:
                lines[-1] += (" " if lines[-1] else "") + part
        return " \\\n".join("  " + line for line in lines)


@dataclass
class Runner:
    """Runs commands in `root` with these variables added to the environment; logs go to the folder `logs`."""

    root: Path
    logs: Path
    variables: Mapping[str, str]
    total: int
    number: int = 0

    def run(self, command: Command) -> None:
        """Run one command. Raises QuickstartError, with its last lines, if it fails."""
        self.number += 1
        print(f"\n[{self.number}/{self.total}] {command.title}\n{command.wrapped}", flush=True)
        log = self.logs / f"{self.number:02d}-{re.sub(r'[^a-z0-9]+', '-', command.title.lower()).strip('-')}.txt"
        began = time.monotonic()
        code = self._execute(command, log)
        if code != 0:
            raise QuickstartError(
                f"This command failed with exit code {code}:\n{command.wrapped}\n"
                + "".join(f"    | {line}\n" for line in _last_lines(log))
                + f"All of its output: {log}"
            )
        if command.output:
            print(f"      {(self.root / command.output).read_text(encoding='utf-8').strip()[:WIDTH]}")
        print(f"      {time.monotonic() - began:.1f} s", flush=True)

    def _execute(self, command: Command, log: Path) -> int:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        environment = {**os.environ, **self.variables, "PATH": path}
        words = [shutil.which(command.words[0], path=path) or command.words[0], *command.words[1:]]
        with log.open("w", encoding="utf-8") as record, _standard_output(self.root, command) as output:
            try:
                # In a session of its own: Ctrl-C reaches us alone, and we tell the children in order.
                process = subprocess.Popen(
                    words,
                    cwd=self.root,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output or subprocess.PIPE,
                    stderr=subprocess.PIPE if output else subprocess.STDOUT,
                    text=True,
                    errors="replace",
                    start_new_session=True,
                )
            except OSError as error:
                raise QuickstartError(f"{command.words[0]} cannot be started: {error}") from error
            with _stopped_at_the_end(process):
                _relay(process.stderr if output else process.stdout, record, command.show)
                return process.wait()


def _last_lines(log: Path) -> list[str]:
    """The last words of the command itself."""
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()
    report = next((at for at, line in enumerate(lines) if re.search(LAUNCHER_REPORT, line)), None)
    # Nothing before it: the launcher itself has failed, and its report is the news.
    return lines[:report][-LAST_LINES:] or lines[-LAST_LINES:]


@contextmanager
def _standard_output(root: Path, command: Command) -> Iterator[IO[str] | None]:
    if command.output is None:
        yield None
        return
    with (root / command.output).open("w", encoding="utf-8") as file:
        yield file


def _relay(lines: IO[str] | None, record: TextIO, show: str) -> None:
    """Write every line to the record, and to the terminal those that match."""
    assert lines is not None
    for line in lines:
        record.write(line)
        record.flush()
        if re.search(show, line):
            print(f"      {line.rstrip()[:WIDTH]}", flush=True)


@contextmanager
def _stopped_at_the_end(process: subprocess.Popen[str]) -> Iterator[None]:
    """However the block is left, no process of the command stays behind."""
    try:
        yield
    except BaseException:
        family = [process.pid, *_descendants(process.pid)]
        print("      stopping", flush=True)
        try:
            with suppress(ProcessLookupError):
                process.terminate()  # torchrun passes it on
            process.wait(GRACE_S)
        except (subprocess.TimeoutExpired, KeyboardInterrupt):
            print("      it does not end by itself, or you will not wait: killing it", flush=True)
        finally:
            for pid in family:
                if pid == process.pid or Path(f"/proc/{pid}").exists():
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            process.wait()
        raise


def _descendants(pid: int) -> list[int]:
    """The processes under this one, also those that left its group as torchrun's workers do; none without /proc."""
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return []
    return [found for child in map(int, children) for found in (child, *_descendants(child))]


@contextmanager
def clean_folder(folder: Path) -> Iterator[None]:
    """Make the folder empty and ours for as long as the block lasts.

    Raises QuickstartError if it holds what this did not make, is in use, or cannot be written.
    """
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise QuickstartError(f"{folder} is not a folder: move it away, then start again.")
    try:
        file = _claim(folder)
    except OSError as error:
        raise QuickstartError(
            f"{error.filename or folder} cannot be changed ({error.strerror or error}), and the quickstart needs "
            f"{folder} for itself: delete that folder, or copy the project to a place that you may write to."
        ) from error
    with file:
        yield


def _claim(folder: Path) -> TextIO:
    """Empty the folder; the marker in it stays locked until the returned file is closed."""
    marker = folder / MARKER
    if folder.is_dir() and any(folder.iterdir()) and not marker.exists():
        raise QuickstartError(
            f"{folder} exists, and the quickstart did not make it, so it is left as it is: move or delete it, then "
            "start again."
        )
    folder.mkdir(exist_ok=True)
    file = marker.open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path != marker:
                path.unlink()
    except BaseException as error:
        file.close()
        if isinstance(error, BlockingIOError):
            raise QuickstartError(f"Another quickstart is running in {folder}: wait until it has ended.") from error
        raise
    return file


def interrupt_on_termination() -> None:
    """Let SIGTERM and a closed terminal end this process as Ctrl-C does, children first."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
            signal.signal(number, _interrupt)


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells in columns, the first row a heading; the first column flush left, the others flush right."""
    widths = [max(38 if column == 0 else 10, *(len(row[column]) for row in rows)) for column in range(len(rows[0]))]
    lines = []
    for number, row in enumerate(rows):
        first = f"{'  ' if number else ''}{row[0]}".ljust(widths[0])
        others = (f"  {cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))
        lines.append((first + "".join(others)).rstrip())
    return "\n".join(lines)
