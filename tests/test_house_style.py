"""The size limits of the house style, which no linter here checks: files under 500 lines, functions under 80."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def sources() -> Iterator[Path]:
    for folder in ("megatron", "examples", "benchmarks", "tools", "tests"):
        yield from (ROOT / folder).rglob("*.py")


def test_files_stay_short() -> None:
    lengths = {str(path.relative_to(ROOT)): path.read_text().count("\n") for path in sources()}
    assert lengths
    assert {name: length for name, length in lengths.items() if length > 500} == {}


def test_functions_stay_short() -> None:
    functions = {
        f"{path.relative_to(ROOT)}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path in sources()
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.end_lineno is not None
    }
    assert functions
    assert {name: length for name, length in functions.items() if length > 80} == {}
