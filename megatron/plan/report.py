"""A result as text for the terminal and as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

from megatron.plan.energy import energy_of
from megatron.plan.memory import CATEGORIES
from megatron.plan.result import Result, StageResult
from megatron.utils.units import format_count

GB = 1e9
# Stages that look the same are shown as one line beyond this many.
_MOST_LINES = 16


def to_json(result: Result) -> dict[str, Any]:
    """All values of a result, derived ones included."""
    content = dataclasses.asdict(result)
    del content["timeline"]
    content |= {
        "fits": result.fits,
        "tokens_per_s_per_gpu": result.tokens_per_s_per_gpu,
        "mfu_causal": result.utilization(result.model_flops_causal),
        "mfu_full": result.utilization(result.model_flops_full),
        "hfu": result.utilization(result.hardware_flops),
        "run_days": result.run_days,
        **dataclasses.asdict(energy_of(result)),
    }
    for stage, values in zip(result.stages, content["stages"], strict=True):
        values["peak_bytes"] = stage.peak_bytes
    return content


def to_text(result: Result) -> str:
    """The tables that `megatron plan` prints."""
    parts = [_head(result), _memory(result), _time(result), _traffic(result), _run(result)]
    if result.problems:
        parts.append("\n".join(f"PROBLEM: {problem}" for problem in result.problems))
    return "\n\n".join(parts) + "\n"


def layouts_to_text(results: Sequence[Result]) -> str:
    """One line for each layout, best first."""
    rows = [["step s", "tokens/s a GPU", "MFU causal", "peak GB", "bubble", "layout"]]
    names = ("tensor", "data", "pipeline", "schedule", "micro batch", "recompute", "ZeRO")
    for result in results:
        layout = ", ".join(f"{name} {result.layout[name]}" for name in names if name in result.layout)
        figures = [
            f"{result.step_s:.2f}",
            f"{result.tokens_per_s_per_gpu:,.0f}",
            f"{result.utilization(result.model_flops_causal):.1%}",
            f"{result.fullest.peak_bytes / GB:.1f}",
            f"{result.bubble:.1%}",
        ]
        rows.append([*figures, layout])
    head = f"{results[0].title} on {results[0].gpus} x {results[0].gpu}\n{results[0].interconnect}\n"
    return head + _table(rows) + "\n"


def _head(result: Result) -> str:
    layout = ", ".join(f"{name} {value}" for name, value in result.layout.items())
    return f"{result.title} on {result.gpus} x {result.gpu}\n{result.interconnect}\n{layout}"


def _memory(result: Result) -> str:
    header = ["memory, GB", *CATEGORIES, "reserved", "peak"]
    rows = [header]
    for stage, more in _shown(result):
        amounts = [stage.memory_bytes[name] for name in CATEGORIES]
        cells = [f"{amount / GB:.2f}" for amount in (*amounts, stage.reserved_bytes, stage.peak_bytes)]
        rows.append([f"stage {stage.stage}{more} ({_layers(stage)})", *cells])
    worst, limit = result.fullest, result.gpu_memory_bytes
    left = (limit - worst.peak_bytes) / GB
    verdict = f"fits: {left:.1f} GB" if left >= 0 else f"DOES NOT FIT: {-left:.1f} GB too much"
    words = "left" if left >= 0 else "for"
    return f"{_table(rows)}\n{verdict} {words} stage {worst.stage} of {limit / GB:.1f} GB a GPU"


def _time(result: Result) -> str:
    names = list(dict.fromkeys(name for stage in result.stages for name in stage.seconds))
    rows = [["seconds of a step", *names, "sum"]]
    for stage, more in _shown(result):
        cells = [f"{stage.seconds.get(name, 0.0):.3f}" for name in names]
        rows.append([f"stage {stage.stage}{more}", *cells, f"{sum(stage.seconds.values()):.3f}"])
    lines = [
        f"step {result.step_s:.3f} s; {result.tokens_per_s_per_gpu:,.0f} tokens/s a GPU, "
        f"{result.tokens_per_s_per_gpu * result.gpus:,.0f} in all; bubble {result.bubble:.1%} of the step",
        f"MFU {result.utilization(result.model_flops_causal):.1%} (model FLOPs, causal attention), "
        f"{result.utilization(result.model_flops_full):.1%} (full attention); "
        f"HFU {result.utilization(result.hardware_flops):.1%} (all FLOPs of the program)",
    ]
    return "\n".join([_table(rows), *lines])


def _traffic(result: Result) -> str:
    rows = [["sent in a step by a rank of stage 0", "over", "messages", "GB"]]
    rows += [
        [f"{entry.axis} {entry.kind}", entry.link, f"{entry.count}", f"{entry.sent_bytes / GB:.3f}"]
        for entry in sorted(result.traffic, key=lambda entry: -entry.sent_bytes)
        if entry.stage == 0 and entry.sent_bytes > 0
    ]
    return _table(rows) if len(rows) > 1 else "nothing is sent: one GPU"


def _run(result: Result) -> str:
    energy, tokens = energy_of(result), result.tokens_per_step * result.steps
    return (
        f"run: {result.steps:,} steps, {format_count(tokens)} tokens: {result.run_days:.2f} days, "
        f"{energy.gpu_hours:,.0f} GPU-hours, {energy.kwh:,.0f} kWh, {energy.kg_co2:,.0f} kg CO2"
    )


def _layers(stage: StageResult) -> str:
    return " + ".join(map(str, stage.layers)) + " layers"


def _shown(result: Result) -> Iterator[tuple[StageResult, str]]:
    """The stages of which a table has a line, each with a mark where it stands for several."""
    stages = result.stages
    if len(stages) <= _MOST_LINES:
        yield from ((stage, "") for stage in stages)
        return
    yield stages[0], ""
    yield stages[1], f" … {stages[-2].stage}"
    yield stages[-1], ""


def _table(rows: list[list[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
