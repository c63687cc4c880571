"""`megatron plan` as a user runs it."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from megatron.__main__ import main

WORDS = ["plan", "--config", "tiny", "--gpus", "8"]
LAYOUT = ["--parallel.tensor=2", "--parallel.pipeline=2", "--train.global_batch=8", "--train.micro_batch=1"]


def test_tables_json_and_page(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    page = tmp_path / "plan.html"
    assert main([*WORDS, *LAYOUT, "--html", str(page)]) == 0
    text = capsys.readouterr().out
    for words in ("memory, GB", "stage 1", "fits:", "MFU", "tp all_gather", "GPU-hours", "kg CO2"):
        assert words in text
    content = page.read_text()
    assert "http" not in content.replace("http://www.w3.org", ""), "the page needs nothing from elsewhere"
    pictures = content.split("<svg")[1:]
    assert len(pictures) == 3
    for picture in pictures:
        ElementTree.fromstring("<svg" + picture.partition("</svg>")[0] + "</svg>")
    assert main([*WORDS, *LAYOUT, "--json"]) == 0
    values = json.loads(capsys.readouterr().out)
    assert values["fits"] and values["gpus"] == 8 and not values["problems"]
    assert values["layout"]["data"] == 2 and len(values["stages"]) == 2
    assert values["tokens_per_s_per_gpu"] * 8 * values["step_s"] == pytest.approx(values["tokens_per_step"])


def test_search_lists_layouts_best_first(capsys: pytest.CaptureFixture[str]) -> None:
    smaller = ["--model.num_hidden_layers=2", "--train.global_batch=4"]
    assert main(["plan", "--config", "tiny", *smaller, "--gpus", "2", "--search", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    times = [result["step_s"] for result in found]
    assert len(found) >= 3 and times == sorted(times)
    assert len({json.dumps(result["layout"]) for result in found}) == len(found)
    assert all(result["fits"] for result in found)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--gpus", "3", "--parallel.tensor=2"], "3 processes cannot be divided"),
        (["--gpus", "8", "--gpu", "a100"], "unknown gpu 'a100': did you mean"),
        (["--gpus", "8", "--interconnect", "token-ring"], "unknown interconnect 'token-ring'"),
        (["--gpus", "8", "--sarch"], "unrecognized arguments: --sarch"),
    ],
)
def test_wrong_input_is_one_message(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--config", "tiny", *words]) == 2
    assert message in capsys.readouterr().err
