"""The generated reference is complete, and the file in docs/ is up to date."""

from __future__ import annotations

from pathlib import Path

from megatron.config.reference import main, reference
from megatron.config.schema import all_keys

DOCS = Path(__file__).resolve().parents[2] / "docs" / "configuration.md"


def test_every_key_is_described() -> None:
    text = reference()
    assert all(f"| `{dotted}` |" in text for dotted in all_keys())


def test_the_committed_reference_is_up_to_date() -> None:
    assert DOCS.read_text(encoding="utf-8") == reference(), "run `make docs`"


def test_check_tells_a_stale_file_and_writing_mends_it(tmp_path: Path) -> None:
    path = tmp_path / "configuration.md"
    assert main([str(path), "--check"]) == 1
    assert main([str(path)]) == 0
    assert main([str(path), "--check"]) == 0
    path.write_text(path.read_text() + "more\n")
    assert main([str(path), "--check"]) == 1
