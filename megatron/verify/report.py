"""The certificate as text and as JSON."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

import megatron
from megatron.verify.certificate import Certificate
from megatron.verify.compare import TOLERANCE

_MOST_LINES = 12


def to_text(certificate: Certificate, command: str) -> str:
    """What a user reads, and attaches to a report."""
    grid = certificate.grid
    lines = [
        f"megatron-med {megatron.__version__}, torch {torch.__version__}: {command}",
        f"tensor {grid.tensor} x context {grid.context} x data {grid.data} x pipeline {grid.pipeline}, "
        f"{certificate.parameters:,} parameters, float64, against one rank; deviations relative to the largest element",
        "",
    ]
    width = max(len(deviation.name) for deviation in certificate.deviations)
    for deviation in certificate.deviations[:_MOST_LINES]:
        lines.append(f"{deviation.what:<10}{deviation.name:<{width}}  {deviation.value:.1e}")
    rest = len(certificate.deviations) - _MOST_LINES
    if rest > 0:
        lines.append(f"and {rest} more, all at most {certificate.deviations[_MOST_LINES].value:.1e}")
    if certificate.mutations:
        lines += ["", "left out on purpose:"]
    for mutation in certificate.mutations:
        axis, kind = mutation.use
        far = "the program stopped" if mutation.deviation is None else f"off by {mutation.deviation:.1e}"
        lines.append(f"  {kind} over {axis}: {far}{'' if mutation.caught else ', NOT NOTICED'}")
    verdict = "EQUIVALENT" if certificate.holds else "NOT EQUIVALENT"
    worst = certificate.largest
    lines += [
        "",
        f"{verdict}: largest deviation {worst.value:.1e} ({worst.what}, {worst.name}), allowed {TOLERANCE:.0e}",
    ]
    return "\n".join(lines) + "\n"


def to_json(certificate: Certificate) -> dict[str, Any]:
    """All of it."""
    return {
        "equivalent": certificate.holds,
        "grid": dataclasses.asdict(certificate.grid),
        "parameters": certificate.parameters,
        "tolerance": TOLERANCE,
        "deviations": [dataclasses.asdict(deviation) for deviation in certificate.deviations],
        "mutations": [
            {
                "axis": mutation.use[0],
                "kind": mutation.use[1],
                "deviation": mutation.deviation,
                "caught": mutation.caught,
            }
            for mutation in certificate.mutations
        ],
    }
