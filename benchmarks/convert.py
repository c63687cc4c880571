"""Conversion against `cp` and fsync of the same files: seconds, ratio, and memory over the interpreter with imports.

Generates a bf16 checkpoint with the widths of Llama-7B and as many layers as `--gigabytes` asks for (at least 1), then
times `cp` and every conversion in turns, `--rounds` times, each in a process of its own, and prints the best of each. A
ratio is against the `cp` right before it, since the speed of memory and disk changes by the minute: the median counts.
The files are in the page cache in all of them; everything written is flushed to the disk in all of them.

    python benchmarks/convert.py --gigabytes 4 --folder /data/tmp
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from megatron.checkpoint.huggingface import MODEL_CONFIG, config_text
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.utils.units import format_bytes

WIDTHS = {
    "vocab_size": 32000,
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "head_dim": 128,
}

# One conversion in a fresh process: seconds without the imports, peak memory over that after them.
_CHILD = """
import json, sys, time
from pathlib import Path
import megatron.checkpoint.convert as module
def peak(): return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
source, destination, options = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
before, began = peak(), time.monotonic()
module.convert(Path(source), Path(destination), **options)
print(json.dumps([time.monotonic() - began, peak() - before]))
"""


@dataclass
class Case:
    """A conversion: from the result of which other (None: the generated model), and how."""

    name: str
    source: str | None
    options: dict[str, object]
    seconds: list[float] = field(default_factory=list)
    memory_bytes: list[int] = field(default_factory=list)
    copies: list[float] = field(default_factory=list)  # seconds of `cp` right before each


CASES = [
    Case("hf to tp 1", None, {"to": "native", "tensor": 1, "pipeline": 1}),
    Case("hf to tp 8 x pp 4", None, {"to": "native", "tensor": 8, "pipeline": 4}),
    Case("tp 8 x pp 4 to hf", "hf to tp 8 x pp 4", {"to": "huggingface"}),
    Case("tp 8 x pp 4 to tp 2 x pp 2", "hf to tp 8 x pp 4", {"to": "native", "tensor": 2, "pipeline": 2}),
    Case("hf to megatron-llm tp 8 x pp 4", None, {"to": "megatron-llm", "tensor": 8, "pipeline": 4}),
    Case("megatron-llm to hf", "hf to megatron-llm tp 8 x pp 4", {"to": "huggingface"}),
    Case(
        "megatron-llm tp 8 x pp 4 to tp 2",
        "hf to megatron-llm tp 8 x pp 4",
        {"to": "megatron-llm", "tensor": 2, "pipeline": 1},
    ),
    Case("hf to meta, 2 shards", None, {"to": "meta", "tensor": 2}),
]


def write_model(folder: Path, gigabytes: float) -> int:
    """Write the model as one Hugging Face folder; returns its number of layers."""
    layers = 4
    while True:
        config = ModelConfig(**WIDTHS, num_hidden_layers=layers + 4)  # type: ignore[arg-type]
        if 2 * config.num_parameters > gigabytes * 1e9:
            break
        layers += 4
    config = ModelConfig(**WIDTHS, num_hidden_layers=layers)  # type: ignore[arg-type]
    folder.mkdir()
    (folder / MODEL_CONFIG).write_text(config_text(config.to_huggingface("bfloat16")))
    noise = torch.randn(2**22, generator=torch.Generator().manual_seed(1)).bfloat16()
    shapes = canonical_shapes(config)
    plan = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    with SafetensorsWriter(folder / "model.safetensors", plan, {"format": "pt"}) as writer:
        for name in writer.order:
            shape = shapes[name]
            for row in range(0, shape[0], 1024):
                rows = (min(1024, shape[0] - row), *shape[1:])
                count = torch.Size(rows).numel()
                writer.write(name, noise.repeat(-(-count // noise.numel()))[:count].view(rows))
        writer.close()
    return layers


def copy(source: Path, destination: Path) -> float:
    """Seconds of `cp` and a flush of what it wrote."""
    began = time.monotonic()
    subprocess.run(["cp", "-r", "--reflink=never", source, destination], check=True)
    files = [path for path in destination.rglob("*") if path.is_file()]
    subprocess.run(["sync", *files], check=True)
    seconds = time.monotonic() - began
    print(f"cp: {seconds:.1f} s", file=sys.stderr, flush=True)
    return seconds


def measure(case: Case, source: Path, destination: Path) -> None:
    """Convert once in a process of its own."""
    command = [sys.executable, "-c", _CHILD, str(source), str(destination), json.dumps(case.options)]
    seconds, memory_bytes = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    print(f"{case.name}: {seconds:.1f} s", file=sys.stderr, flush=True)
    case.seconds.append(seconds)
    case.memory_bytes.append(memory_bytes)


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=4.0)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, help="where to work (default: the system's temporary folder)")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    arguments = parser.parse_args(words)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as work:
        root = Path(work)
        model = root / "model"
        layers = write_model(model, arguments.gigabytes)
        size_bytes = sum(path.stat().st_size for path in model.iterdir())
        print(f"Llama-7B widths, {layers} layers, {format_bytes(size_bytes)} in bf16")
        chosen = [case for case in CASES if arguments.only in case.name]
        needed = {case.source for case in chosen}
        for case in CASES:
            if case.name in needed:
                measure(case, model, root / case.name.replace(" ", "_"))
                case.seconds.clear()
        copies = []
        for _ in range(arguments.rounds):
            for case in chosen:
                copies.append(copy(model, root / "copy"))
                case.copies.append(copies[-1])
                shutil.rmtree(root / "copy")
                source = model if case.source is None else root / case.source.replace(" ", "_")
                measure(case, source, root / "out")
                shutil.rmtree(root / "out")
        best = min(copies)
        print(
            f"{'cp and fsync':<36}{best:7.2f} s   (of {len(copies)}; median {sorted(copies)[len(copies) // 2]:.2f} s)"
        )
        for case in chosen:
            seconds = min(case.seconds)
            ratio = statistics.median(own / cp for own, cp in zip(case.seconds, case.copies, strict=True))
            memory = max(case.memory_bytes) / 1e6
            print(f"{case.name:<36}{seconds:7.2f} s   {ratio:5.2f} x cp   {memory:5.0f} MB")


if __name__ == "__main__":
    main()
