"""The order of the samples and the loader, on one core: how long until the first sample, and how many tokens a second.

The order is made for 10 million documents of 5 billion tokens (their index alone is real; the tokens are a hole in a
file). The stable order is timed from an open pair to the place of its first sample; opening, which checks the whole
index, is said apart. For Megatron's order, beside ours, its parts: the two shuffles of numpy, which it has too, and the
index of samples, compiled and in numpy.

The loader reads random tokens from the page cache. Its peers: a bare gather, which copies windows of the mapped file
into int64 rows and does nothing else; and a sample at a time in the way of Megatron's GPT dataset, with its
concatenations, masks and positions, stacked to batches.

All times are processor time, reading threads included, so that what else the machine does counts little; the best of
several rounds, in turns.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from harness.machine import describe_machine

from megatron.data import native
from megatron.data.blend import Blend, MegatronChoices, StableChoices, Stage
from megatron.data.dataset import RowDataset
from megatron.data.indexed import IndexedReader, IndexedWriter
from megatron.data.loader import BatchLoader
from megatron.data.order import megatron_order
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset
from megatron.data.stream import Stream

_WEIGHTS = [0.62, 0.08, 0.30]


def main() -> None:
    """Measure, print, write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--documents", type=int, default=10_000_000, help="for the orders (default %(default)s)")
    parser.add_argument("--tokens", type=int, default=100_000_000, help="for the loader (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--quick", action="store_true", help="a smoke run: figures mean nothing")
    parser.add_argument("--json", type=Path, help="write the figures there as well")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.documents, arguments.tokens, arguments.rounds = 20_000, 3_000_000, 1
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    torch.set_num_threads(1)
    compiled = "compiled" if native.load() is not None else "in numpy: nothing was compiled"
    print(f"{describe_machine(1)}\nhelpers of the data path: {compiled}")
    with tempfile.TemporaryDirectory() as folder:
        figures = {
            "order": measure_orders(Path(folder), arguments.documents, arguments.rounds),
            "loader": measure_loader(Path(folder), arguments.tokens, arguments.rounds),
        }
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=2) + "\n")


def best(action: Callable[[], Any], rounds: int) -> float:
    """Processor seconds of the quickest call."""
    seconds = []
    for _ in range(rounds):
        began = time.process_time()
        action()
        seconds.append(time.process_time() - began)
    return min(seconds)


def measure_orders(folder: Path, documents: int, rounds: int) -> dict[str, float]:
    """Seconds and bytes until each order is ready."""
    prefix = write_index(folder / "large", documents)
    figures = {"open": best(lambda: IndexedReader(prefix), rounds)}
    stream = Stream(IndexedReader(prefix))
    sequence_length, tokens = 4096, stream.num_tokens
    samples = (tokens - 1) // sequence_length
    print(f"\n{documents:,} documents, {tokens:,} tokens, {samples:,} samples of {sequence_length:,}")
    print(f"{'open the pair and check its index':<50} {figures['open'] * 1e3:>10.2f} ms")

    def stable(count: int) -> Callable[[], Any]:
        def make() -> Any:
            members = [StableOrderDataset(stream, sequence_length=sequence_length, seed=seed) for seed in range(count)]
            blend = Blend(members, [Stage(0, StableChoices(_WEIGHTS[:count]), tuple(range(count)))])
            found: RowDataset = members[0] if count == 1 else blend
            found.source(0)
            return found

        return make

    for count in (1, 3):
        name = "stable order" if count == 1 else "blend of 3 in the stable order"
        figures[name] = best(stable(count), rounds)
        tracemalloc.start()
        kept = stable(count)()
        size = figures[f"{name}, bytes"] = tracemalloc.get_traced_memory()[0]
        tracemalloc.stop()
        del kept
        print(f"{name:<50} {figures[name] * 1e3:>10.2f} ms {size / 1e3:>10.0f} kB")
    sizes = np.array(stream.sizes)
    order = megatron_order(sizes, sequence_length=sequence_length, samples=samples, seed=1)
    entries, generator = np.array(order.document_index), np.random.RandomState(1)
    numbers, shuffled = np.arange(samples, dtype=np.uint32), np.arange(documents, dtype=np.int32)
    parts: list[tuple[str, Callable[[], Any]]] = [
        ("Megatron's order", lambda: megatron_order(sizes, sequence_length=sequence_length, samples=samples, seed=1)),
        ("  numpy's shuffle of the documents", lambda: generator.shuffle(shuffled)),
        ("  index of samples", lambda: native.sample_index(sizes, entries, sequence_length, samples)),
        ("  the same in numpy", lambda: native.sample_index_in_numpy(sizes, entries, sequence_length, samples)),
        ("  numpy's shuffle of the samples", lambda: generator.shuffle(numbers)),
    ]
    for name, action in parts:
        figures[name.strip()] = seconds = best(action, rounds)
        print(f"{name:<50} {seconds * 1e3:>10.2f} ms")
    return figures


def write_index(prefix: Path, documents: int) -> str:
    """The index of documents of 500 tokens on average, and a hole in place of their tokens."""
    sizes = np.random.default_rng(0).geometric(1 / 500, documents).astype(np.int64)
    with IndexedWriter(prefix, "<u2") as writer:
        writer.add_documents(np.empty(0, "<u2"), np.empty(0, np.int64))
    header = Path(f"{prefix}.idx").read_bytes()[:18]
    pointers = 2 * (np.cumsum(sizes) - sizes)
    with open(f"{prefix}.idx", "wb") as file:
        file.write(header + np.array([documents, documents + 1], "<u8").tobytes())
        file.write(sizes.astype("<i4").tobytes() + pointers.astype("<i8").tobytes())
        file.write(np.arange(documents + 1, dtype="<i8").tobytes())
    os.truncate(f"{prefix}.bin", 2 * int(sizes.sum()))
    return str(prefix)


def measure_loader(folder: Path, tokens: int, rounds: int) -> list[dict[str, Any]]:
    """Tokens a second of the loader and its peers, per length, batch and order."""
    prefix = str(folder / "read")
    generator = np.random.default_rng(1)
    sizes = generator.geometric(1 / 500, max(10, tokens // 500))
    with IndexedWriter(prefix, "<u2") as writer:
        for some in np.array_split(sizes, max(1, len(sizes) // 2000)):
            writer.add_documents(generator.integers(0, 32_000, int(some.sum())).astype("<u2"), some)
    rows = []
    print(f"\nmillions of tokens a second from the page cache, {int(sizes.sum()):,} tokens of documents of 500")
    for length, micro_batch, global_batch in ((4096, 4, 64), (4096, 1, 8), (2048, 8, 256), (512, 16, 256)):
        stream = Stream(IndexedReader(prefix))
        samples = min((stream.num_tokens - 1) // length, 2**22 // length * 8) // global_batch * global_batch
        cases: dict[str, Callable[[], int]] = {
            "bare gather": lambda s=stream, n=length, c=samples: gather(s, n, c),
            "in Megatron's way": lambda s=stream, n=length, c=samples // 8, b=micro_batch: one_by_one(s, n, c, b),
        }
        for name, dataset in datasets(stream, length, samples).items():
            cases[name] = lambda d=dataset, c=samples, m=micro_batch, g=global_batch: load(d, c, m, g, 0)
        cases["stable, readahead 4"] = lambda c=samples, m=micro_batch, g=global_batch, s=stream, n=length: load(
            datasets(s, n, c)["stable"], c, m, g, 4
        )
        speeds = dict.fromkeys(cases, 0.0)
        for _ in range(rounds):
            for name, action in cases.items():
                began = time.process_time()
                count = action() * length
                speeds[name] = max(speeds[name], count / (time.process_time() - began))
        print(f"samples of {length:,}, micro-batch {micro_batch}, global batch {global_batch}")
        for name, speed in speeds.items():
            print(f"  {name:<30} {speed / 1e6:>8.0f}  {speed / speeds['bare gather']:>6.2f} of the bare gather")
            rows.append({"length": length, "micro_batch": micro_batch, "global_batch": global_batch, "who": name,
                         "tokens_per_second": speed})  # fmt: skip
    return rows


def datasets(stream: Stream, length: int, samples: int) -> dict[str, RowDataset]:
    """What the loader reads."""

    def stable(seed: int) -> StableOrderDataset:
        return StableOrderDataset(stream, sequence_length=length, seed=seed)

    def megatron(seed: int) -> MegatronOrderDataset:
        return MegatronOrderDataset(stream, sequence_length=length, samples=samples, seed=seed)

    members = (0, 1, 2)
    return {
        "stable": stable(1),
        "blend of 3, stable": Blend([stable(s) for s in members], [Stage(0, StableChoices(_WEIGHTS), members)]),
        "Megatron's order": megatron(1),
        "blend of 3, Megatron's": Blend(
            [megatron(s) for s in members], [Stage(0, MegatronChoices(_WEIGHTS), members)], samples
        ),
    }


def load(dataset: RowDataset, samples: int, micro_batch: int, global_batch: int, readahead: int) -> int:
    """Read through the loader; how many samples."""
    with BatchLoader(
        dataset,
        global_batch=global_batch,
        micro_batch=micro_batch,
        rank=0,
        size=1,
        vocab_size=32_000,
        pad_last=True,
        readahead=readahead,
    ) as loader:
        for _ in range(samples // global_batch):
            loader.next_batch()
    return samples


def gather(stream: Stream, length: int, samples: int) -> int:
    """Windows of the mapped file, copied into rows."""
    stored = stream.reader.read_stream(0, stream.num_tokens).view(np.ndarray)
    windows = np.random.default_rng(2).permutation((len(stored) - 1) // length)[:samples].tolist()
    rows = np.empty((16, length + 1), dtype=np.int64)
    for at, window in enumerate(windows):
        rows[at % 16] = stored[window * length : window * length + length + 1]
    return samples


def one_by_one(stream: Stream, length: int, samples: int, batch: int) -> int:
    """A sample at a time: find its documents, read and join them, make tokens, labels, mask and positions of them;
    stack samples to batches."""
    order = megatron_order(stream.sizes, sequence_length=length, samples=samples, seed=1)
    reader = stream.reader

    def sample(index: int) -> dict[str, torch.Tensor]:
        run = order.shuffle_index[index]
        (first, start), (last, end) = order.sample_index[run], order.sample_index[run + 1]
        pieces = []
        for entry in range(first, last + 1):
            low = start if entry == first else 0
            document = int(order.document_index[entry])
            pieces.append(reader.read(document, int(low), int(end + 1 - low) if entry == last else None))
        text = torch.from_numpy(np.concatenate(pieces).astype(np.int64)).long()
        tokens, labels = text[:-1].contiguous(), text[1:].contiguous()
        return {
            "tokens": tokens,
            "labels": labels,
            "loss_mask": torch.ones(length, dtype=torch.float),
            "position_ids": torch.arange(length, dtype=torch.long),
        }

    for index in range(0, samples - samples % batch, batch):
        some = [sample(one) for one in range(index, index + batch)]
        {name: torch.stack([one[name] for one in some]) for name in some[0]}
    return samples - samples % batch


if __name__ == "__main__":
    main()
