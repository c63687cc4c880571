"""`megatron preprocess` against the raw encoders and against other tools, on the same text and the same cores.

The raw contestants encode texts that lie in memory and do nothing else: SentencePiece, Hugging Face's `tokenizers` and
gigatoken, each with its own threads; none can be outdone by what also reads, parses and writes. `encode_batch` is this
project's encoder alone, in one thread. Then, from JSON lines to files: `megatron preprocess`, a pool of processes as
Megatron has it, and datatrove where it is installed (without what it needs for other things):

    pip install --no-deps datatrove dill humanize loguru multiprocess

They take turns, round after round. Rates are of the text in UTF-8. A command's time counts from its start to its end;
"steady" is its rate without what it takes to start and end, from a second run on a tenth of the text. "MB/cpu-s" is the
text per second of a processor's time, which what else the machine does hardly touches. Memory is the
largest sum of resident memory over a contestant's processes: what they share is counted for each.

The text is MedQuAD's answers, film reviews, guidelines and articles from ../shared/data, or the texts of --input, over
again in passes until there is enough of it; a cache has seen every word after the first pass.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import resource
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from harness.machine import describe_machine

from megatron.tokenizer.backends import SentencePieceBackend
from megatron.tokenizer.engines import choose_engine

_SHARED = Path(__file__).resolve().parents[2] / "shared" / "data"
_OURS = "megatron preprocess"
_RAW = ("sentencepiece", "tokenizers", "gigatoken", "encode_batch")
_PEERS = ("pool", "datatrove")
_SMALL = 10  # the second run of a command has this part of the text


@dataclass
class Lane:
    """A contestant and what was measured of it."""

    name: str
    seconds: list[float] = field(default_factory=list)
    small_seconds: list[float] = field(default_factory=list)
    processor_seconds: list[float] = field(default_factory=list)
    tokens: int = 0
    peak_bytes: int = 0
    failure: str | None = None


def main() -> None:
    """Measure, print the tables, write the figures."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the contestant is ended and the corpus removed
    arguments = parse_arguments()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: arguments.cores])
    machine = describe_machine(arguments.cores)
    print(machine)
    with tempfile.TemporaryDirectory(prefix="preprocess-", dir=arguments.folder) as temporary:
        folder = Path(temporary).resolve()  # contestants run in it: datatrove leaves logs where it is started
        wanted = arguments.megabytes * 10**6 if not arguments.quick else 10**6
        text_bytes = {name: write_corpus(folder / name, size, arguments.input) for name, size in (
            ("whole.jsonl", wanted), ("small.jsonl", wanted // _SMALL)
        )}  # fmt: skip
        print(f"{text_bytes['whole.jsonl'] / 1e6:.1f} MB of text, {arguments.tokenizer.name}", flush=True)
        lanes = measure(folder, arguments)
    print("\n".join(table(lanes, text_bytes)))
    if arguments.json is not None:
        figures = {"machine": machine, "cores": arguments.cores, "text_bytes": text_bytes}
        figures["contestants"] = [vars(lane) for lane in lanes]
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, nargs="+", metavar="F", help='JSON lines with a "text" each')
    parser.add_argument("--tokenizer", type=Path, default=_SHARED / "tokenizers/mistral_v1_tokenizer.model")
    parser.add_argument("--megabytes", type=int, default=100, help="of text (default %(default)s)")
    parser.add_argument("--cores", type=int, default=len(os.sched_getaffinity(0)), help="(default: all)")
    parser.add_argument("--rounds", type=int, default=2, help="(default %(default)s)")
    parser.add_argument("--contestants", help="comma-separated parts of names (default: all)")
    parser.add_argument("--folder", type=Path, help="for the corpus and the outputs (default: the temporary one)")
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean nothing")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there")
    arguments = parser.parse_args()
    if not arguments.tokenizer.is_file() or not (arguments.input or _SHARED.is_dir()):
        parser.exit(message="skipped: ../shared/data is not there; give --input and --tokenizer\n")
    return arguments


def texts(inputs: list[Path] | None) -> Iterator[str]:
    """Every text once."""
    for path in inputs or ():
        with open(path, encoding="utf-8") as lines:
            yield from (json.loads(line)["text"] for line in lines)
    if inputs:
        return
    with tarfile.open(_SHARED / "medquad_ccby4.tar.gz") as files:
        for member in files:
            if member.name.endswith(".xml"):
                content = files.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]
                yield from (found for found in re.findall(r"<Answer>(.+?)</Answer>", content, re.DOTALL))
    with zipfile.ZipFile(_SHARED / "replay/movie_reviews.zip") as reviews:
        yield from (reviews.read(name).decode("utf-8", errors="replace") for name in reviews.namelist())
    with tarfile.open(_SHARED / "guidelines/nstg2022.tar.gz") as files:
        for member in filter(tarfile.TarInfo.isfile, files):
            yield files.extractfile(member).read().decode("utf-8", errors="replace")  # type: ignore[union-attr]
    yield from (path.read_text(encoding="utf-8", errors="replace") for path in sorted(_SHARED.glob("jats/*.nxml")))


def write_corpus(path: Path, wanted: int, inputs: list[Path] | None) -> int:
    """Write JSON lines with `wanted` bytes of text or a little more, in as many passes as that takes; their bytes."""
    written = 0
    with open(path, "w", encoding="utf-8") as output:
        while written < wanted:
            before = written
            for text in texts(inputs):
                if written >= wanted:
                    break
                output.write(json.dumps({"id": written, "text": text}, ensure_ascii=False) + "\n")
                written += len(text.encode("utf-8"))
            if written == before:
                sys.exit("the input has no text")
    return written


def measure(folder: Path, arguments: argparse.Namespace) -> list[Lane]:
    """Every contestant in its turn, round after round."""
    library = SentencePieceBackend(arguments.tokenizer, arguments.tokenizer.read_bytes())
    choose_engine(library)  # so that the log says what the command will use
    names = [*_RAW, _OURS, *_PEERS]
    if arguments.contestants:
        names = [name for name in names if any(part in name for part in arguments.contestants.split(","))]
    lanes = [Lane(name) for name in names]
    form = library.form().content
    for number in range(arguments.rounds):
        for lane in lanes[number % len(lanes) :] + lanes[: number % len(lanes)]:
            for corpus in ("whole", "small") if lane.name not in _RAW else ("whole",):
                if lane.failure is None:
                    job = {"corpus": str(folder / f"{corpus}.jsonl"), "tokenizer": str(arguments.tokenizer.resolve())}
                    job |= {"cores": arguments.cores, "folder": str(folder), "form": form}
                    turn(lane, corpus, job, folder)
        print(f"round {number + 1} of {arguments.rounds} done", flush=True)
    return lanes


def turn(lane: Lane, corpus: str, job: dict[str, Any], folder: Path) -> None:
    """One run of a contestant."""
    description = folder / "job.json"
    description.write_text(json.dumps(job), encoding="utf-8")
    command = [sys.executable, "-m", "harness.encoders", lane.name, str(description)]
    if lane.name == _OURS:
        options = {
            "--input": job["corpus"],
            "--tokenizer": job["tokenizer"],
            "--output-prefix": str(folder / "ours"),
            "--workers": str(job["cores"]),
        }
        command = [sys.executable, "-m", "megatron", "preprocess", *(word for pair in options.items() for word in pair)]
    here = Path(__file__).resolve().parent
    environment = os.environ | {"RAYON_NUM_THREADS": str(job["cores"]), "TOKENIZERS_PARALLELISM": "true"}
    environment["PYTHONPATH"] = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
    begin = time.perf_counter()
    with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment, cwd=folder)
        try:
            while process.poll() is None:
                lane.peak_bytes = max(lane.peak_bytes, resident_bytes_of_tree(process.pid))
                time.sleep(0.02)
        finally:
            process.terminate()  # without effect on one that has ended
        seconds, after = time.perf_counter() - begin, resource.getrusage(resource.RUSAGE_CHILDREN)
        processor_seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        output.seek(0)
        errors.seek(0)
        said, complaints = output.read(), errors.read()
    if process.returncode:
        missing = re.search(r"No module named '?([\w.]+)", complaints)
        lane.failure = f"{missing.group(1)} is not installed" if missing else complaints.strip().splitlines()[-1][:200]
        return
    if lane.name == _OURS:
        lane.tokens = max(lane.tokens, (folder / "ours_text_document.bin").stat().st_size // 2)
    else:
        outcome = json.loads(said.strip().splitlines()[-1])
        lane.tokens = max(lane.tokens, outcome["tokens"])
        seconds = outcome["seconds"]
        if lane.name in _RAW:  # the others' processes are counted when they have all ended
            processor_seconds = outcome["processor_seconds"]
    if corpus == "whole":
        lane.processor_seconds.append(processor_seconds)
    (lane.seconds if corpus == "whole" else lane.small_seconds).append(seconds)


def resident_bytes_of_tree(pid: int) -> int:
    """Physical memory of a process and of all below it, shared pages counted for each."""
    total = 0
    try:
        fields = Path(f"/proc/{pid}/statm").read_text().split()
        total = int(fields[1]) * os.sysconf("SC_PAGE_SIZE")
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                total += resident_bytes_of_tree(int(child))
    except (OSError, IndexError):
        return total  # it has ended meanwhile
    return total


def table(lanes: list[Lane], text_bytes: dict[str, int]) -> list[str]:
    """A line for each contestant, then what this project's command reaches of the raw rates and of its peers'."""
    columns = ("MB/s best", "median", "steady", "MB/cpu-s", "M tokens/s", "tokens", "peak MB")
    lines = [f"{'':22}" + "".join(f"{column:>12}" for column in columns)]
    whole, small = text_bytes["whole.jsonl"], text_bytes["small.jsonl"]
    for lane in lanes:
        if not lane.seconds:
            lines.append(f"{lane.name:22}  {lane.failure}")
            continue
        best = min(lane.seconds)
        cells = [
            f"{whole / best / 1e6:.1f}",
            f"{whole / statistics.median(lane.seconds) / 1e6:.1f}",
            _steady(lane, whole, small),
            f"{whole / min(lane.processor_seconds) / 1e6:.1f}",
            f"{lane.tokens / best / 1e6:.2f}",
            f"{lane.tokens:,}",
            f"{lane.peak_bytes / 1e6:.0f}",
        ]
        lines.append(f"{lane.name:22}" + "".join(f"{cell:>12}" for cell in cells))
    ours = next((lane for lane in lanes if lane.name == _OURS and lane.seconds), None)
    if ours is not None:
        others = [lane for lane in lanes if lane is not ours and lane.seconds and lane.name != "encode_batch"]
        for lane in others:
            wall, processor = (
                min(getattr(lane, clock)) / min(getattr(ours, clock)) for clock in ("seconds", "processor_seconds")
            )
            lines.append(f"{_OURS} / {lane.name}: {wall:.2f} of the rate, {processor:.2f} per processor second")
    return lines


def _steady(lane: Lane, whole: int, small: int) -> str:
    if not lane.small_seconds:
        return "-"
    seconds = min(lane.seconds) - min(lane.small_seconds)
    return f"{(whole - small) / seconds / 1e6:.1f}" if seconds > 0 else "-"


if __name__ == "__main__":
    main()
