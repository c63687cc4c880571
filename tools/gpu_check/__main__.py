"""Try on a GPU what could only be tried without one: kernels, steps, adapters. Needs no network.

Exit codes: 0 all is well, 1 something is not, 2 there is no GPU.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from megatron.config.kernels import KernelsConfig
from megatron.kernels import native
from megatron.kernels.diagnosis import diagnose
from megatron.kernels.vendor.library import Place
from megatron.kernels.vendor.select import load_vendor_kernels
from megatron.utils.device import compute_capability
from megatron.utils.errors import ConfigError
from tools.gpu_check import operations, steps

# Bytes per second of the data sheets, to set the measured copy beside.
_DATA_SHEETS = {
    "A100-SXM4-80GB": 2.039e12,
    "A100 80GB PCIe": 1.935e12,
    "A100-SXM4-40GB": 1.555e12,
    "H100 80GB": 3.35e12,
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """Elements on a side of the operations' arrays, bytes of the copied buffer, and the model whose step is timed."""

    size: int = 8192
    copy_bytes: int = 2**30
    model: Any = steps.LARGE
    length: int = 2048


def main(words: list[str] | None = None) -> int:
    """Check everything, print it, write the report."""
    parser = argparse.ArgumentParser(prog="python -m tools.gpu_check", description=__doc__)
    parser.add_argument("--report", type=Path, default=Path("gpu-check.json"), help="(default %(default)s)")
    arguments = parser.parse_args(words)
    if not torch.cuda.is_available():
        say("no GPU here: torch.cuda.is_available() is False; `megatron doctor` says why")
        return 2
    return check(torch.device("cuda", 0), arguments.report, Sizes())


def check(device: torch.device, report: Path, sizes: Sizes) -> int:
    """Run all checks on `device`, and write the figures to `report`."""
    figures: dict[str, Any] = {"facts": [dataclasses.asdict(fact) for fact in diagnose()]}
    figures["kernels"] = native.select("auto", device.type)
    say(figures["kernels"])
    problems = [] if native.in_use(device.type) else [f"no compiled kernels for {device.type}"]
    figures["copy_bytes_per_s"] = rate = operations.copy_rate(device, sizes.copy_bytes)
    say(f"a copy moves {rate / 1e9:.0f} GB/s{_data_sheet(device)}")
    figures["operations"] = []
    for precision, dtype in operations.DTYPES.items() if not problems else ():
        for operation in operations.operations(device, dtype, sizes.size):
            row = attempt(lambda operation=operation: operations.check(operation, rate))
            figures["operations"].append({"precision": precision, "operation": operation.name, **row})
    figures["steps"] = [
        {"precision": one, **attempt(lambda one=one: steps.check_step(device, one))} for one in steps.DTYPES
    ]
    figures["measured_steps"] = [
        {
            "precision": one,
            **attempt(lambda one=one: steps.measure_step(device, one, sizes.model, sizes.length)),
        }
        for one in operations.DTYPES
    ]
    figures["adapters"] = adapters(Place(device, compute_capability(device)))
    for row in (*figures["operations"], *figures["steps"], *figures["measured_steps"]):
        say(describe(row))
        if row["problem"] is not None:
            problems.append(f"{row['precision']} {row.get('operation', 'step')}: {row['problem']}")
    for name, text in figures["adapters"].items():
        say(f"{name}: {text}")
    figures["problems"] = problems
    report.write_text(json.dumps(figures, indent=1) + "\n")
    for problem in problems:
        say(f"PROBLEM: {problem}")
    say(f"Please send us {report}, whatever it says: attach it to an issue of this project.")
    return 1 if problems else 0


def attempt(check: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """The figures of one check; one that fails is a problem of its own, and the others go on."""
    try:
        return check()
    except (RuntimeError, AssertionError) as error:
        return {"problem": f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"}


def adapters(place: Place) -> dict[str, str]:
    """What each adapter for a library says of itself."""
    found = {}
    for key in ("flash_attention", "apex"):
        try:
            config = KernelsConfig(**{key: True})
            found[key] = load_vendor_kernels(config, place, heads=8, key_value_heads=2, head_dim=128).words[0]
        except ConfigError as error:
            found[key] = str(error)
    return found


def describe(row: dict[str, Any]) -> str:
    """One line of figures."""
    words = [row["precision"], row.get("operation", "step")]
    if "seconds" in row:
        words.append(f"{row['seconds'] * 1e6:.0f} us, {row['share_of_copy']:.0%} of a copy's bandwidth,")
    words += [f"{name} {row[name]:.1e}" for name in ("error", "error_of_reference", "loss_error") if name in row]
    if "tokens_per_s" in row:
        words.append(f"{row['tokens_per_s']:.0f} tokens/s, {row['host_syncs']} host syncs")
    if "peak_bytes" in row:
        words.append(f"peak {row['peak_bytes'] / 2**30:.2f} GiB")
    return " ".join([*words, "ok" if row["problem"] is None else row["problem"]])


def _data_sheet(device: torch.device) -> str:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    peak = next((peak for known, peak in _DATA_SHEETS.items() if known in name), None)
    return "" if peak is None else f", of {peak / 1e9:.0f} on the data sheet of {name}"


def say(line: str) -> None:
    """One line of the result."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())
