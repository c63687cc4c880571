"""Kill preprocessing with SIGKILL at random moments and go on, until it ends: the result must be that of a quiet run.

    python -m tests.data.killing --kills 50

does it with fifty kills and says what it saw. The tests do a few.
"""

from __future__ import annotations

import argparse
import bz2
import gzip
import io
import json
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import sentencepiece

# Records every 50 ms and in small chunks, so that a short run has many moments.
_PROGRAM = """
import sys
from megatron.data.preprocess import journal, reading, run
journal.RECORD_EVERY_S = 0.05
run.CHUNK_BYTES = 20_000
reading.read_chunks.__defaults__ = (20_000,)
from megatron.__main__ import main
sys.exit(main(sys.argv[1:]))
"""
SUFFIXES = (".bin", ".idx", ".json")


def make_tokenizer(path: Path) -> Path:
    """A small SentencePiece model with byte fallback."""
    draw, words = random.Random(7), ["the", "patient", "was", "given", "aspirin", "for", "pain", "and", "fever"]
    lines = [" ".join(draw.choices(words, k=9)) for _ in range(200)]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=content, model_type="bpe", vocab_size=310, byte_fallback=True,
        minloglevel=2,
    )  # fmt: skip
    path.write_bytes(content.getvalue())
    return path


def make_inputs(folder: Path, rows: int) -> list[Path]:
    """Files of every kind, with blank lines, bad lines and empty texts among the rows."""
    draw = random.Random(3)
    words = ["the", "patient", "was", "given", "aspirin", "for", "pain", "and", "fever", "µg", "日本", "naïve\n"]
    lines = []
    for number in range(rows):
        row = {"q": " ".join(draw.choices(words, k=draw.randrange(40))), "a": "x" * draw.randrange(3), "n": number}
        lines.append(json.dumps(row, ensure_ascii=number % 2 == 0).encode())
        if draw.random() < 0.02:
            lines.append(
                draw.choice([b"", b"  ", b"{", b'{"q": 1, "a": ""}', b"\xff", b'{"q": "' + b"long " * 9000 + b'"}'])
            )
    cuts = [rows * part // 3 for part in range(4)]
    packers = {"a.jsonl": bytes, "b.jsonl.gz": gzip.compress, "c.jsonl.bz2": bz2.compress}
    files = []
    for (name, pack), begin, end in zip(packers.items(), cuts, cuts[1:], strict=False):
        (folder / name).write_bytes(pack(b"\n".join(lines[begin:end]) + b"\n"))
        files.append(folder / name)
    return files


def command(inputs: Sequence[Path], prefix: Path, tokenizer: Path, workers: int) -> list[str]:
    return [
        sys.executable, "-c", _PROGRAM, "preprocess", "--input", *map(str, inputs), "--output-prefix", str(prefix),
        "--tokenizer", str(tokenizer), "--json-keys", "q", "a", "--append-eod", "--max-bad-lines", "5%",
        "--workers", str(workers),
    ]  # fmt: skip


def outcome(prefix: Path) -> dict[str, bytes]:
    """All that a run has left, by the end of its name."""
    return {
        path.name.removeprefix(prefix.name): path.read_bytes()
        for path in prefix.parent.iterdir()
        if path.name.startswith(prefix.name)
    }


def kill_and_go_on(words: list[str], draw: random.Random, longest_s: float, most_kills: int) -> int:
    """Run until it ends, killing it at random moments at most so many times; how often that was."""
    kills = 0
    while True:
        process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
        try:
            _, said = process.communicate(timeout=draw.uniform(0, longest_s) if kills < most_kills else 300)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            process.communicate()
            kills += 1
            continue
        assert process.returncode == 0, said
        return kills


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        inputs, tokenizer = make_inputs(folder, arguments.rows), make_tokenizer(folder / "tokenizer.model")
        (folder / "out").mkdir()
        start_s = time.monotonic()
        subprocess.run(command(inputs, folder / "out/quiet", tokenizer, 2), check=True, stderr=subprocess.DEVNULL)
        quiet_s = time.monotonic() - start_s
        expected = outcome(folder / "out/quiet")
        print(f"a quiet run takes {quiet_s:.1f} s and leaves {', '.join(sorted(expected))}")
        draw, kills, runs = random.Random(arguments.seed), 0, 0
        while kills < arguments.kills:
            prefix = folder / f"out/run{runs}."
            words = command(inputs, prefix, tokenizer, draw.choice([1, 2, 3]))
            here = kill_and_go_on(words, draw, 1.1 * quiet_s, arguments.kills - kills)
            kills, runs = kills + here, runs + 1
            same = outcome(prefix) == expected
            print(f"run {runs}: killed {here} times, then {'identical' if same else 'DIFFERENT'}")
            assert same
        print(f"{kills} kills over {runs} runs: every result was identical")


if __name__ == "__main__":
    main()
