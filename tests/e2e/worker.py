"""One process of a pool that runs the program's command line again and again: starting Python anew is most of a run.

Reads one JSON object a line from standard input, `{"environment": {...}, "words": [...], "errors": FILE, "output":
FILE}`, runs `megatron` on the words with these variables, and answers `{"code": …}` on standard output.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback


def run(words: list[str]) -> int:
    from megatron.__main__ import main

    try:
        return main(words)
    except SystemExit as leaving:
        return leaving.code if isinstance(leaving.code, int) else 1
    except Exception:
        traceback.print_exc()
        return 1


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
        ):
            code = run(order["words"])
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # after an error the program leaves it ignored
        answers.write(json.dumps({"code": code}) + "\n")
        answers.flush()


if __name__ == "__main__":
    serve()
