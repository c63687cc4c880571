"""The metrics file: what a line holds, and what a resume keeps of it."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from megatron.config.log import LogConfig
from megatron.train.sinks import METRICS_FILE, JsonLines, open_sinks, set_aside
from megatron.utils.errors import ConfigError


def write(path: Path, restored_step: int, steps: range, loss: float = 1.0) -> None:
    sink = JsonLines(path, restored_step)
    for step in steps:
        sink.write(step, {"loss": loss, "tokens": step * 10})
    sink.close()


def read(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_one_object_for_each_step(tmp_path: Path) -> None:
    write(tmp_path / "m.jsonl", 0, range(1, 4))
    assert read(tmp_path / "m.jsonl") == [{"step": step, "loss": 1.0, "tokens": step * 10} for step in (1, 2, 3)]


def test_lines_are_there_at_once(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl", 0)
    sink.write(1, {"loss": 2.5})
    assert read(tmp_path / "m.jsonl") == [{"step": 1, "loss": 2.5}], "a killed run keeps what it had logged"
    sink.close()


def test_resume_drops_later_lines_and_appends(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    write(path, 0, range(1, 8), loss=1.0)
    write(path, 4, range(5, 7), loss=2.0)
    assert [(line["step"], line["loss"]) for line in read(path)] == [
        (1, 1.0),
        (2, 1.0),
        (3, 1.0),
        (4, 1.0),
        (5, 2.0),
        (6, 2.0),
    ]


def test_what_another_run_wrote_is_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / METRICS_FILE
    for loss in (1.0, 2.0, 3.0):
        with caplog.at_level("INFO", "megatron"):
            set_aside(tmp_path)
        write(path, 0, range(1, 4), loss)
        (tmp_path / "config.yaml").write_text(f"{loss}")
    found = {file.name: read(file)[0]["loss"] for file in tmp_path.glob("*.jsonl")}
    assert found == {"metrics-1.jsonl": 1.0, "metrics-2.jsonl": 2.0, "metrics.jsonl": 3.0}
    configs = {file.name: float(file.read_text()) for file in tmp_path.glob("*.yaml")}
    assert configs == {"config-1.yaml": 1.0, "config-2.yaml": 2.0, "config.yaml": 3.0}
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"{path} is of another run and is now metrics-{number}.jsonl" for number in (1, 2)]


def test_an_empty_file_is_not_worth_keeping(tmp_path: Path) -> None:
    (tmp_path / METRICS_FILE).touch()
    (tmp_path / "config.yaml").touch()
    set_aside(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml", METRICS_FILE]


@pytest.mark.parametrize("broken", ['{"step": 3, "lo', '{"step": 3, "loss": 1.0}', "[]", '{"loss": 1.0}', "\x00\x00"])
def test_a_broken_last_line_does_not_survive(tmp_path: Path, broken: str) -> None:
    """A line that was cut off must go, even one without its newline: the next line would be glued to it."""
    path = tmp_path / "m.jsonl"
    write(path, 0, range(1, 3))
    with path.open("a") as file:
        file.write(broken)
    write(path, 3, range(4, 6))
    found = [line["step"] for line in read(path)]
    assert found in ([1, 2, 4, 5], [1, 2, 3, 4, 5])
    assert (3 in found) == (broken == '{"step": 3, "loss": 1.0}'), "only a whole line is kept"


def test_a_loss_that_is_not_finite_stays_json(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "m.jsonl", 0)
    sink.write(1, {"loss": math.nan, "grad_norm": math.inf, "tokens": 3})
    sink.close()
    text = (tmp_path / "m.jsonl").read_text()
    assert json.loads(text, parse_constant=lambda word: pytest.fail(f"{word} is no JSON")) == {
        "step": 1,
        "loss": None,
        "grad_norm": None,
        "tokens": 3,
    }


def test_which_sinks_are_opened(tmp_path: Path) -> None:
    assert open_sinks(LogConfig(), 0, {}) == []
    (sink,) = open_sinks(LogConfig(dir=str(tmp_path)), 0, {})
    sink.write(1, {"loss": 1.0})
    sink.close()
    assert read(tmp_path / METRICS_FILE) == [{"step": 1, "loss": 1.0}]
    with pytest.raises(ConfigError, match=r"set log\.dir"):
        open_sinks(LogConfig(tensorboard=True), 0, {})


def test_tensorboard_gets_scalars_and_forgets_later_ones(tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for restored, loss in ((0, 1.0), (2, 5.0)):
        sinks = open_sinks(LogConfig(dir=str(tmp_path), tensorboard=True), restored, {})
        for step in range(restored + 1, 5):
            for sink in sinks:
                sink.write(step, {"loss": loss + step})
        for sink in sinks:
            sink.close()
    events = accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {event.step: event.value for event in events.Scalars("loss")} == {1: 2.0, 2: 3.0, 3: 8.0, 4: 9.0}


def test_missing_extras_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "wandb", None)
    monkeypatch.setitem(__import__("sys").modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match=r"megatron-med\[wandb\]"):
        open_sinks(LogConfig(wandb_project="x"), 0, {})
    with pytest.raises(ConfigError, match=r"megatron-med\[tensorboard\]"):
        open_sinks(LogConfig(dir=str(tmp_path), tensorboard=True), 0, {})
