"""One contestant of benchmarks/preprocess.py in a process of its own: read a corpus, encode it, say how long it took.

`python -m harness.encoders NAME JOB.json` prints a line of JSON: seconds, processor seconds, tokens. Raw contestants
encode texts that are in memory already, and their clock runs for that alone; those that read and write run whole.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

Job = dict[str, Any]
Outcome = dict[str, float]


def sentencepiece(job: Job) -> Outcome:
    """SentencePiece's own pool of threads."""
    import sentencepiece as library

    processor = library.SentencePieceProcessor(model_file=job["tokenizer"])
    texts = _texts(job)
    clock = Clock()
    ids = processor.encode(texts, num_threads=job["cores"])
    return clock.outcome(sum(map(len, ids)))


def tokenizers(job: Job) -> Outcome:
    """Hugging Face's batch encoder, which has a pool of threads, on the form of the tokenizer with the same ids."""
    import tokenizers as library

    tokenizer = library.Tokenizer.from_str(job["form"])
    tokenizer.encode_special_tokens = True
    texts = _texts(job)
    clock = Clock()
    encodings = tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return clock.outcome(sum(len(encoding.ids) for encoding in encodings))


def gigatoken(job: Job) -> Outcome:
    """gigatoken's batch encoder, which has a pool of threads, with nothing in its caches."""
    import awkward  # noqa: F401  (it is imported by the first batch otherwise)
    import gigatoken.gigatoken_rs as library

    tokenizer = library.load_hf_json(job["form"])
    texts = _texts(job)
    clock = Clock()
    ids = tokenizer.encode_batch(texts, parallel=job["cores"] > 1)
    return clock.outcome(len(ids.layout.content.data))


def encode_batch(job: Job) -> Outcome:
    """This project's encoder alone, in one thread."""
    from megatron.tokenizer import load_tokenizer

    tokenizer = load_tokenizer(job["tokenizer"])
    assert tokenizer.engine
    texts = _texts(job)
    clock = Clock()
    tokens, _ = tokenizer.encode_batch(texts, np.uint16)
    return clock.outcome(tokens.size)


def pool(job: Job) -> Outcome:
    """Megatron's way: a pool of processes, each given lines, that answers with lists; the parent writes."""
    clock = Clock()
    count = 0
    with (
        multiprocessing.Pool(job["cores"], initializer=_open_in_pool, initargs=(job["tokenizer"],)) as workers,
        open(job["corpus"], encoding="utf-8") as lines,
        open(Path(job["folder"]) / "pool.bin", "wb") as output,
    ):
        for ids in workers.imap(_encode_in_pool, lines, 32):
            output.write(np.array(ids, np.uint16).tobytes())
            count += len(ids)
        workers.close()
        workers.join()
    return clock.outcome(count)


_IN_POOL: dict[str, Any] = {}


def _open_in_pool(tokenizer: str) -> None:
    import sentencepiece as library

    _IN_POOL["processor"] = library.SentencePieceProcessor(model_file=tokenizer)


def _encode_in_pool(line: str) -> list[int]:
    ids: list[int] = _IN_POOL["processor"].encode(json.loads(line)["text"])
    return ids


def datatrove(job: Job) -> Outcome:
    """datatrove's reader and tokenizer, a process for each core, each with a part of the corpus as a file."""
    from datatrove.executor.local import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    folder = Path(job["folder"])
    parts, form = folder / "parts", folder / "form.json"
    _split(Path(job["corpus"]), parts, job["cores"])
    form.write_text(job["form"], encoding="utf-8")
    clock = Clock()
    stages = [
        JsonlReader(str(parts)),
        DocumentTokenizer(
            str(folder / "datatrove"), tokenizer_name_or_path=str(form), shuffle_documents=False, eos_token=None
        ),
    ]
    LocalPipelineExecutor(stages, tasks=job["cores"], workers=job["cores"], skip_completed=False).run()
    written = sum(path.stat().st_size for path in (folder / "datatrove").glob("*.ds"))
    return clock.outcome(written // 2)


def _split(corpus: Path, folder: Path, parts: int) -> None:
    folder.mkdir(exist_ok=True)
    with open(corpus, "rb") as lines:
        whole = lines.readlines()
    for part in range(parts):
        (folder / f"{part}.jsonl").write_bytes(b"".join(whole[part::parts]))


def _texts(job: Job) -> list[str]:
    with open(job["corpus"], encoding="utf-8") as lines:
        return [json.loads(line)["text"] for line in lines]


class Clock:
    """Time since it was made: on the wall, and of processors in this process and in those it has waited for."""

    def __init__(self) -> None:
        self._wall_s, self._processor_s = time.perf_counter(), _processor_s()

    def outcome(self, tokens: int) -> Outcome:
        wall_s, processor_s = time.perf_counter() - self._wall_s, _processor_s() - self._processor_s
        return {"seconds": wall_s, "processor_seconds": processor_s, "tokens": tokens}


def _processor_s() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)


CONTESTANTS: dict[str, Callable[[Job], Outcome]] = {
    contestant.__name__: contestant
    for contestant in (sentencepiece, tokenizers, gigatoken, encode_batch, pool, datatrove)
}


def main() -> None:
    """Run the contestant that the command line names."""
    name, job = sys.argv[1:]
    answer = sys.stdout
    sys.stdout = sys.stderr  # what a library prints must not come between
    outcome = CONTESTANTS[name](json.loads(Path(job).read_text(encoding="utf-8")))
    print(json.dumps(outcome), file=answer)


if __name__ == "__main__":
    main()
