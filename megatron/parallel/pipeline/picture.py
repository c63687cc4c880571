"""A simulated schedule as a picture: text for the terminal, SVG for a page."""

from __future__ import annotations

import html
from collections.abc import Mapping

from megatron.parallel.pipeline.schedule import LETTERS, label
from megatron.parallel.pipeline.simulate import Bar, Simulation

# Colours that people who do not see red and green apart can tell (Okabe and Ito, 2008); later chunks are darker.
COLOURS: Mapping[str, str] = {"F": "#56b4e9", "B": "#009e73", "I": "#f0e442", "W": "#e69f00"}
WORDS: Mapping[str, str] = {"F": "forward", "B": "backward", "I": "backward, inputs", "W": "backward, weights"}
_WIDTH, _ROW, _MARGIN, _TOP = 1000, 26, 70, 26


def letter(bar: Bar) -> str:
    """F, B, I or W."""
    return LETTERS[type(bar.action)]


def to_text(simulation: Simulation, unit_s: float) -> str:
    """A line for each stage, `unit_s` seconds a column of as many characters as the longest label has; dots are
    idle."""
    width = max(len(label(bar.action)) for bars in simulation.bars for bar in bars) + 1
    lines = []
    for stage, bars in enumerate(simulation.bars):
        line = ""
        for bar in bars:
            start, stop = (round(moment / unit_s) * width for moment in (bar.start, bar.stop))
            line = line.ljust(start, "·") + label(bar.action).ljust(stop - start)
        lines.append(f"stage {stage:<3}" + line.ljust(round(simulation.step_s / unit_s) * width, "·"))
    return "\n".join(lines)


def to_svg(simulation: Simulation) -> str:
    """Every action of every stage on the time axis."""
    scale = (_WIDTH - _MARGIN) / simulation.step_s
    shapes = list(_legend({letter(bar) for bars in simulation.bars for bar in bars}))
    for stage, bars in enumerate(simulation.bars):
        y = _TOP + stage * _ROW
        shapes.append(f'<text x="0" y="{y + 16}">stage {stage}</text>')
        shapes.append(f'<rect x="{_MARGIN}" y="{y}" width="{_WIDTH - _MARGIN}" height="{_ROW - 4}" fill="#eee"/>')
        shapes += [_shape(bar, y, scale) for bar in bars]
    height = _TOP + len(simulation.bars) * _ROW
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height}" '
        f'font-family="system-ui, sans-serif" font-size="11">{"".join(shapes)}</svg>\n'
    )


def _shape(bar: Bar, y: int, scale: float) -> str:
    x, width, words = _MARGIN + bar.start * scale, (bar.stop - bar.start) * scale, html.escape(label(bar.action))
    shade = (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" opacity="{0.18 * bar.action.chunk:.2f}"/>'
    )
    text = f'<text x="{x + 2:.2f}" y="{y + 15}">{words}</text>' if width > 6 * len(words) else ""
    colour = COLOURS[letter(bar)]
    return (
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW - 4}" fill="{colour}" stroke="#fff" '
        f'stroke-width="0.6"><title>{words}: {bar.start:.4g} to {bar.stop:.4g} s</title></rect>'
        f"{shade if bar.action.chunk else ''}{text}"
    )


def _legend(letters: set[str]) -> list[str]:
    shapes, x = [], _MARGIN
    for name in (name for name in COLOURS if name in letters):
        shapes.append(f'<rect x="{x}" y="4" width="12" height="12" fill="{COLOURS[name]}"/>')
        shapes.append(f'<text x="{x + 16}" y="14">{WORDS[name]}</text>')
        x += 40 + 7 * len(WORDS[name])
    return shapes
