"""One process of a pool that runs the program's command line again and again: starting Python anew is most of a run.

Reads one JSON object a line from standard input, `{"environment": {...}, "words": [...], "errors": FILE, "output":
FILE}`, runs `megatron` on the words with these variables, and answers `{"code": …}` on standard output. With a
`"record": FILE` it also writes there what the training steps are given: a line with the digests of all rows for each.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import signal
import struct
import sys
import traceback
from collections.abc import Iterator
from typing import Any


def run(words: list[str]) -> int:
    from megatron.__main__ import main

    try:
        return main(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


@contextlib.contextmanager
def recorded(path: str | None) -> Iterator[None]:
    """Write down what every training step is given."""
    from megatron.train.step import TrainingStep

    call = TrainingStep.__call__

    def record(self: TrainingStep, micro_batches: Any, step: int) -> Any:
        assert path is not None
        rows = [
            hashlib.sha256(struct.pack(f"<{2 * len(tokens)}q", *tokens, *labels)).hexdigest()
            for micro_batch in micro_batches
            for tokens, labels in zip(micro_batch.tokens.tolist(), micro_batch.labels.tolist(), strict=True)
        ]
        with open(path, "a") as file:
            file.write(json.dumps({"step": step, "rows": rows}) + "\n")
        return call(self, micro_batches, step)

    if path is not None:
        TrainingStep.__call__ = record  # type: ignore[method-assign]
    try:
        yield
    finally:
        TrainingStep.__call__ = call  # type: ignore[method-assign]


def serve() -> None:
    import megatron.train.build  # ahead of the first order

    del megatron
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        order = json.loads(line)
        for name, value in order["environment"].items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
        with (
            open(order["errors"], "a") as errors,
            open(order["output"], "a") as output,
            contextlib.redirect_stderr(errors),
            contextlib.redirect_stdout(output),
            recorded(order.get("record")),
        ):
            code = run(order["words"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # after an error the program leaves it ignored
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
