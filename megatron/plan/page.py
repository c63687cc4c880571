"""A result as one HTML page that needs nothing else: tables, and pictures as SVG drawn here."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence

from megatron.plan.energy import energy_of
from megatron.plan.memory import CATEGORIES
from megatron.plan.report import GB, to_text
from megatron.plan.result import Bar, Result

_WIDTH, _ROW, _LABEL = 1000, 22, 130
_RESERVED, _IDLE = "#b8b8b8", "#eeeeee"
# Colours that people who do not see red and green apart can tell (Okabe and Ito, 2008).
_COLOURS = ("#0072b2", "#56b4e9", "#009e73", "#e69f00", "#cc79a7", "#d55e00", "#f0e442", "#999999")
_BAR_COLOURS = {"F": "#56b4e9", "B": "#0072b2", "I": "#009e73", "W": "#e69f00"}
# More bars than this are too thin to be told apart: then only the beginning and the end of the step are drawn.
_MOST_BARS_A_STAGE = 48


def to_page(result: Result) -> str:
    """The page."""
    energy = energy_of(result)
    facts = {
        "time for a step": f"{result.step_s:.2f} s",
        "tokens/s a GPU": f"{result.tokens_per_s_per_gpu:,.0f}",
        "MFU, causal": f"{result.utilization(result.model_flops_causal):.1%}",
        "pipeline bubble": f"{result.bubble:.1%}",
        "memory, fullest GPU": f"{result.fullest.peak_bytes / GB:.1f} of {result.gpu_memory_bytes / GB:.1f} GB",
        "run": f"{result.run_days:.1f} days",
        "GPU-hours": f"{energy.gpu_hours:,.0f}",
        "energy": f"{energy.kwh / 1000:,.1f} MWh",
        "CO₂": f"{energy.kg_co2 / 1000:,.1f} t",
    }
    cards = "".join(f"<div><b>{html.escape(v)}</b><span>{html.escape(k)}</span></div>" for k, v in facts.items())
    sections = [
        _section("Memory of each stage when it is fullest", _memory_picture(result)),
        _section("Where the time of a step goes", _time_picture(result)),
        _section("The step", _timeline_picture(result)),
        _section("All figures", f"<pre>{html.escape(to_text(result))}</pre>"),
    ]
    title = html.escape(f"{result.title} on {result.gpus} x {result.gpu}")
    layout = html.escape(", ".join(f"{name} {value}" for name, value in result.layout.items()))
    problems = "".join(f"<p class=problem>{html.escape(problem)}</p>" for problem in result.problems)
    verdict = "" if result.fits else "<p class=problem>This layout does not fit in the memory of a GPU.</p>"
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style>"
        f"<h1>{title}</h1><p>{html.escape(result.interconnect)}<br>{layout}</p>{verdict}{problems}"
        f"<div class=cards>{cards}</div>{''.join(sections)}</html>\n"
    )


_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; max-width: 1060px; margin: 2em auto; padding: 0 1em; color: #222 }
h1 { font-size: 1.5em } h2 { font-size: 1.15em; margin-top: 2em } svg { width: 100%; height: auto }
.cards { display: flex; flex-wrap: wrap; gap: .6em } .cards div { border: 1px solid #ddd; border-radius: 6px;
padding: .5em .9em } .cards b { display: block; font-size: 1.15em } .cards span { color: #666; font-size: .85em }
.problem { background: #fbe3d6; padding: .5em .9em; border-radius: 6px } pre { overflow-x: auto; font-size: 12px }
text { font: 12px system-ui, sans-serif }
"""


def _section(title: str, content: str) -> str:
    return f"<h2>{html.escape(title)}</h2>{content}"


def _memory_picture(result: Result) -> str:
    rows = [
        (
            f"stage {stage.stage}",
            {**{n: stage.memory_bytes[n] / GB for n in CATEGORIES}, "reserved": stage.reserved_bytes / GB},
        )
        for stage in result.stages
    ]
    return _stacked(rows, "GB", limit=result.gpu_memory_bytes / GB)


def _time_picture(result: Result) -> str:
    return _stacked([(f"stage {stage.stage}", stage.seconds) for stage in result.stages], "s")


def _stacked(rows: Sequence[tuple[str, Mapping[str, float]]], unit: str, limit: float | None = None) -> str:
    """Horizontal bars of parts side by side, with a legend and, where there is one, a line at the limit."""
    names = list(dict.fromkeys(name for _, parts in rows for name in parts))
    colours = dict(zip((n for n in names if n not in ("reserved", "idle")), _COLOURS, strict=False))
    colours |= {"reserved": _RESERVED, "idle": _IDLE}
    longest = max([sum(parts.values()) for _, parts in rows] + [limit or 0.0])
    scale = (_WIDTH - _LABEL - 80) / longest
    shapes, y = [], 30
    for label, parts in rows:
        x = float(_LABEL)
        shapes.append(f'<text x="0" y="{y + 14}">{html.escape(label)}</text>')
        for name, amount in parts.items():
            tip = f"{name}: {amount:.3g} {unit}"
            shapes.append(_rectangle(x, y, amount * scale, _ROW - 5, colours.get(name, "#444"), tip))
            x += amount * scale
        shapes.append(f'<text x="{x + 5:.1f}" y="{y + 13}">{sum(parts.values()):.3g} {unit}</text>')
        y += _ROW
    if limit is not None:
        at = _LABEL + limit * scale
        shapes.append(f'<line x1="{at:.1f}" x2="{at:.1f}" y1="24" y2="{y}" stroke="#d00" stroke-dasharray="4"/>')
    return _svg(y + 5, [*_legend({name: colours.get(name, "#444") for name in names}), *shapes])


def _timeline_picture(result: Result) -> str:
    """Every action of every stage on the time axis; of a long step its two ends."""
    bars = result.timeline
    if not bars:
        return "<p>One stage: nothing to draw.</p>"
    stages = max(bar.stage for bar in bars) + 1
    if len(bars) <= _MOST_BARS_A_STAGE * stages:
        return _bars(bars, stages)
    end = max(bar.stop for bar in bars)
    window = end * _MOST_BARS_A_STAGE / (len(bars) / stages) / 2
    first = [bar for bar in bars if bar.start < window]
    last = [bar for bar in bars if bar.stop > end - window]
    return f"<p>The first {window:.2f} s:</p>{_bars(first, stages)}<p>The last {window:.2f} s:</p>{_bars(last, stages)}"


def _bars(bars: Sequence[Bar], stages: int) -> str:
    low, high = min(bar.start for bar in bars), max(bar.stop for bar in bars)
    scale = (_WIDTH - _LABEL) / (high - low)
    kinds = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
    used = {kinds[letter]: colour for letter, colour in _BAR_COLOURS.items() if any(b.label[0] == letter for b in bars)}
    shapes = [f'<text x="0" y="{30 + stage * _ROW + 14}">stage {stage}</text>' for stage in range(stages)]
    for bar in bars:
        x, width = _LABEL + (bar.start - low) * scale, (bar.stop - bar.start) * scale
        y, tip = 30 + bar.stage * _ROW, f"{bar.label}: {bar.start:.3f} to {bar.stop:.3f} s"
        shapes.append(_rectangle(x, y, width, _ROW - 4, _BAR_COLOURS[bar.label[0]], tip, outlined=True))
        if width > 7 * len(bar.label):
            shapes.append(f'<text x="{x + 3:.1f}" y="{y + 13}" fill="#fff">{html.escape(bar.label)}</text>')
    return _svg(30 + stages * _ROW + 5, [*_legend(used), *shapes])


def _rectangle(x: float, y: float, width: float, height: float, colour: str, tip: str, outlined: bool = False) -> str:
    stroke = ' stroke="#fff" stroke-width="0.6"' if outlined else ""
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{max(width, 0.0):.2f}" height="{height}" fill="{colour}"{stroke}>'
        f"<title>{html.escape(tip)}</title></rect>"
    )


def _legend(colours: Mapping[str, str]) -> Iterable[str]:
    x = _LABEL
    for name, colour in colours.items():
        yield _rectangle(x, 4, 12, 12, colour, name)
        yield f'<text x="{x + 16}" y="15">{html.escape(name)}</text>'
        x += 30 + 7 * len(name)


def _svg(height: float, shapes: Iterable[str]) -> str:
    return f'<svg viewBox="0 0 {_WIDTH} {height:.0f}" xmlns="http://www.w3.org/2000/svg">{"".join(shapes)}</svg>'
