"""Races as tables for people and as figures for programs."""

from __future__ import annotations

from typing import Any

from harness.contestants import MASTERS, OURS, PURE, Workload
from harness.race import Race, Result
from megatron.model.flops import model_flops_per_token
from megatron.utils.units import format_bytes

_PROCESSES = {1: "one process", 2: "two processes"}
_MEMORY_HEAD = f" {'beyond states':>14} {'states':>10} {'peak':>10}"


def speed_table(race: Race, workload: Workload) -> list[str]:
    """Tokens/s, share of the matrix-product peak, memory; then the ratios."""
    flops = _flops_per_token(workload)
    peaks = ", ".join(f"{peak / 1e9:.0f} GFLOP/s ({_PROCESSES[world]})" for world, peak in race.products.items())
    lines = [
        f"{race.precision}, {_PROCESSES[race.processes]}, {race.rounds} rounds; matrix products reach {peaks}",
        f"  {'':24} {'tokens/s best':>13} {'median':>8} {'of peak':>8}" + _MEMORY_HEAD,
    ]
    for result in race.results:
        if not result.seconds:
            lines.append(f"  {result.contestant.name:24} {_absence(result)}")
            continue
        peak = race.products.get(result.contestant.world, 0.0)
        share = f"{result.best * flops / peak:.0%}" if peak else "-"
        lines.append(
            f"  {result.contestant.name:24} {result.best:13,.0f} {result.median:8,.0f} {share:>8}{_memory(result)}"
            + (f"  then failed: {result.failure}" if result.failure else "")
        )
    return lines + _ratios(race) + _notes(race)


def memory_table(race: Race) -> list[str]:
    """Memory alone, and ours as a part of the peers'."""
    lines = [f"{race.precision}, memory", f"  {'':24}" + _MEMORY_HEAD]
    for result in race.results:
        lines.append(f"  {result.contestant.name:24}" + (_memory(result) if result.memory else f" {_absence(result)}"))
    return lines + _ratios(race) + _notes(race)


def figures(race: Race, workload: Workload) -> dict[str, Any]:
    """All of a race for the JSON file."""
    flops = _flops_per_token(workload)
    return {
        "precision": race.precision,
        "processes": race.processes,
        "rounds": race.rounds,
        "products_flops_per_s": {str(world): peak for world, peak in race.products.items()},
        "flops_per_token": flops,
        "contestants": [_figures(result, race, flops) for result in race.results],
        "ratios": [
            {"ours": ours.contestant.name, "peer": peer.contestant.name, **_ratio(ours, peer)}
            for ours, peer in _pairs(race)
        ],
    }


def _figures(result: Result, race: Race, flops: float) -> dict[str, Any]:
    values: dict[str, Any] = {
        "name": result.contestant.name,
        "processes": result.contestant.world,
        "tokens_per_step": result.tokens,
        "step_s": result.seconds,
        "memory_bytes": result.memory,
        "failure": result.failure,
    }
    if result.seconds:
        values |= {"tokens_per_s_best": result.best, "tokens_per_s_median": result.median}
        if peak := race.products.get(result.contestant.world):
            values["share_of_peak"] = result.best * flops / peak
    return values


def _pairs(race: Race) -> list[tuple[Result, Result]]:
    """(one of ours, whom it is compared with) of those who were measured."""
    by_name = {result.contestant.name: result for result in race.results if result.seconds}
    return [(ours, by_name[peer]) for ours in by_name.values() for peer in ours.contestant.peers if peer in by_name]


def _ratio(ours: Result, peer: Result) -> dict[str, float]:
    ratio = {"best": ours.best / peer.best, "median": ours.median / peer.median}
    if ours.memory and peer.memory and ours.contestant.world == peer.contestant.world:
        ratio |= {key: ours.memory[key] / peer.memory[key] for key in ("beyond", "peak") if peer.memory[key] > 0}
    return ratio


def _ratios(race: Race) -> list[str]:
    lines = []
    for ours, peer in _pairs(race):
        ratio, words = _ratio(ours, peer), []
        if race.rounds:
            words.append(f"{ratio['best']:.2f} x as fast by the best step, {ratio['median']:.2f} x by the median")
        if "beyond" in ratio:
            words.append(f"{ratio['beyond']:.2f} x the memory beyond states")
        if "peak" in ratio:
            words.append(f"{ratio['peak']:.2f} x the peak")
        lines.append(f"  {ours.contestant.name} / {peer.contestant.name}: {', '.join(words)}")
    return lines


def _notes(race: Race) -> list[str]:
    notes = []
    if race.precision == "bf16":
        notes = [f"  {MASTERS}.", f"  {PURE}."]
    fewer = {result.tokens for result in race.results if result.contestant.name == OURS}
    for result in race.results:
        if fewer and result.tokens not in fewer and result.contestant.pipeline > 1:
            notes.append(
                f"  {result.contestant.name} has {result.tokens:,} tokens a step, {OURS} {min(fewer):,}: its optimizer "
                "costs less per token."
            )
    return notes


def _memory(result: Result) -> str:
    if result.memory is None:
        return f" {'-':>14} {'-':>10} {'-':>10}"
    beyond, states, peak = (format_bytes(result.memory[key]) for key in ("beyond", "states", "peak"))
    return f" {beyond:>14} {states:>10} {peak:>10}"


def _absence(result: Result) -> str:
    missing = result.failure is not None and result.failure.endswith("is not installed")
    return f"skipped: {result.failure}" if missing else f"failed: {result.failure}"


def _flops_per_token(workload: Workload) -> float:
    return model_flops_per_token(workload.model, workload.sequence_length)
