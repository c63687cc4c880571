"""The quickstart as a user meets it: a whole run made short, its README, its folder, failures and interruptions."""

from __future__ import annotations

import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

QUICKSTART = Path(__file__).resolve().parents[2] / "examples" / "quickstart"
STEPS = 4


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str], ModuleType]]:
    """Imports the quickstart's own modules by name, as its scripts do."""
    names = ("quickstart", "runner", "compose", "cases")
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.syspath_prepend(str(QUICKSTART / "corpus"))

    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project of its own that holds nothing but the quickstart."""
    shutil.copytree(QUICKSTART, tmp_path / "examples" / "quickstart", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


def start(project: Path, *words: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(project / "examples" / "quickstart" / "quickstart.py"), *words],
        cwd="/",
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(project: Path, *words: str) -> tuple[int, str, str]:
    process = start(project, *words)
    output, errors = process.communicate()
    return process.returncode, output, errors


def figures(output: str, row: str) -> list[float]:
    """The figures in the row of the closing tables that begins so."""
    line = next(line for line in output.splitlines() if line.strip().startswith(row))
    return [float(cell.replace(",", "")) for cell in line.split(row)[1].split()]


def test_the_whole_story_in_a_few_steps(project: Path) -> None:
    # what an earlier quickstart left behind goes; a second one beside it is the subject of another test
    (project / "quickstart" / "export").mkdir(parents=True)
    (project / "quickstart" / "export" / "stale.txt").touch()
    (project / "quickstart" / ".made-by-quickstart").touch()
    code, output, errors = run(project, "--steps", str(STEPS))
    assert code == 0, output + errors
    folder = project / "quickstart"

    (before, after), (train_before, train_after) = (
        figures(output, name) for name in ("held-out text", "training text")
    )
    assert before == pytest.approx(math.log(1024), abs=0.1)
    assert train_before == pytest.approx(math.log(1024), abs=0.1)
    assert after < before - 0.2, "even this few steps teach it which tokens are frequent"
    assert train_after < train_before - 0.2
    assert figures(output, "2 processes: tensor 2")[0] > 0
    assert figures(output, "4 processes: tensor 2 x pipeline 2")[0] > 0
    (ours,) = figures(output, "held-out loss by this project")
    (theirs,) = figures(output, "held-out loss by transformers")
    assert ours == pytest.approx(theirs, abs=2e-6)
    assert ours == pytest.approx(after, abs=1e-3), "the export is not the model that was trained"
    assert figures(output, "largest difference of a logit")[0] < 1e-4

    metrics = [json.loads(line) for line in (folder / "log" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in metrics] == list(range(1, STEPS + 1))
    assert metrics[-1]["validation_loss"] == pytest.approx(after, abs=1e-3)
    assert (folder / "loss.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert {"config.json", "model.safetensors", "tokenizer.model"} <= {
        path.name for path in (folder / "export").iterdir()
    }
    assert not (folder / "export" / "stale.txt").exists()
    assert json.loads((folder / "results" / "transformers.json").read_text())["differing_documents"] == 0
    assert sorted(path.name[:2] for path in (folder / "output").iterdir()) == [f"{n:02d}" for n in range(1, 14)]


def test_the_readme_shows_the_commands_that_run(modules: Callable[[str], ModuleType]) -> None:
    quickstart = modules("quickstart")
    blocks = re.findall(r"^( *)```sh\n(.*?)^ *```$", (QUICKSTART / "README.md").read_text(), flags=re.M | re.S)
    lines = "\n".join(text for _, text in blocks).replace("\\\n", " ").splitlines()
    shown = [shlex.split(line) for line in lines if line.strip()]
    commands = [shlex.split(command.text) for command in quickstart.plan()]
    assert [words for words in shown if words[0] in ("megatron", "python", "torchrun")] == commands
    others = [shlex.join(words) for words in shown if words not in commands]
    assert others[0].endswith("examples/quickstart/quickstart.py")
    wanted = [shlex.join(shlex.split(line)) for line in quickstart.preamble()[1:] if not line.startswith("source")]
    assert set(wanted) <= set(others)


def test_a_wrapped_command_is_the_same_command(modules: Callable[[str], ModuleType]) -> None:
    for command in modules("quickstart").plan():
        assert max(map(len, command.wrapped.splitlines())) <= 116
        assert shlex.split(command.wrapped.replace("\\\n", " ")) == shlex.split(command.text)


def test_the_configuration_ends_where_the_story_does(modules: Callable[[str], ModuleType]) -> None:
    from megatron.config.load import load_config

    config = load_config(str(QUICKSTART / "config.yaml"), [])
    assert config.train.steps == config.optimizer.decay_steps == modules("quickstart").STEPS


def test_the_corpus_is_what_its_notes_give(modules: Callable[[str], ModuleType]) -> None:
    compose = modules("compose")
    train, held_out = compose.compose()
    for name, lines in (("train", train), ("heldout", held_out)):
        assert (QUICKSTART / "data" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines() == lines
    topics = [{json.loads(line)["topic"] for line in lines} for lines in (train, held_out)]
    assert len(topics[0]) > 70
    assert len(topics[1]) > 8
    assert not topics[0] & topics[1]
    texts = [json.loads(line)["text"] for line in train + held_out]
    assert len(set(texts)) == len(texts)


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_it_did_not_make_it_does_not_delete(project: Path, kind: str) -> None:
    place, kept = project / "quickstart", project / "kept"
    kept.mkdir()
    (kept / "thesis.txt").write_text("five years of work")
    if kind == "folder":
        shutil.copytree(kept, place)
    elif kind == "file":
        place.write_text("five years of work")
    else:
        (kept / ".made-by-quickstart").touch()
        place.symlink_to(kept)
    code, _, errors = run(project)
    assert code == 1
    assert str(place) in errors
    assert "start again" in errors
    assert "Traceback" not in errors
    file = place if kind == "file" else place / "thesis.txt"
    assert file.read_text() == "five years of work"


def test_a_tree_that_cannot_be_written_is_named(
    tmp_path: Path, modules: Callable[[str], ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    runner, place = modules("runner"), tmp_path / "quickstart"
    monkeypatch.setattr(Path, "mkdir", refuse)  # root, who may run this, is refused nothing
    with pytest.raises(runner.QuickstartError, match="Permission denied") as error, runner.clean_folder(place):
        pytest.fail("went on without its folder")
    assert str(error.value).startswith(f"{place} cannot be changed")


def test_two_at_a_time_are_one_too_many(project: Path, modules: Callable[[str], ModuleType]) -> None:
    with modules("runner").clean_folder(project / "quickstart"):
        code, _, errors = run(project)
    assert code == 1
    assert "Another quickstart is running" in errors


def test_a_failing_command_ends_it_and_says_why(project: Path) -> None:
    (project / "examples" / "quickstart" / "data" / "train.jsonl").write_text("not JSON\n")
    code, output, errors = run(project)
    assert code == 1
    assert "[1/13]" in output
    assert "[2/13]" not in output
    assert "failed with exit code 1" in errors
    assert "python examples/quickstart/make_model.py" in errors
    assert "JSONDecodeError" in errors
    log = Path(errors.strip().rsplit(": ", 1)[1])
    assert "JSONDecodeError" in log.read_text()


def test_a_failure_under_torchrun_is_told_in_the_words_of_the_worker(
    tmp_path: Path, modules: Callable[[str], ModuleType]
) -> None:
    runner = modules("runner")
    said = ["step 1", "megatron train: error: the disk is full"]
    report = ["E1 1:2:3 7 torch/distributed/elastic/multiprocessing/api.py:10] failed (exitcode: 2) local_rank: 0"]
    for lines in ([*said, *report, *["report"] * 30], [*report, "report"]):
        code = f"import sys; print({chr(10).join(lines)!r}); sys.exit(3)"
        with pytest.raises(runner.QuickstartError, match="failed with exit code 3") as error:
            runner.Runner(tmp_path, tmp_path, {}, 1).run(runner.Command("Train", (sys.executable, "-c", code)))
        told = [line[6:] for line in str(error.value).splitlines() if line.startswith("    | ")]
        assert told == (said if lines[:2] == said else lines)


FAMILY = """
import subprocess, time
# as torchrun's workers: in a session of their own
child = subprocess.Popen(["sleep", "300"], start_new_session=True)
print("started", child.pid, flush=True)
time.sleep(300)
"""
STORY = """
import sys
from pathlib import Path
from runner import Command, Runner
import signal
signal.signal(signal.SIGINT, signal.default_int_handler)
folder = Path(sys.argv[1])
Runner(folder, folder, {}, 1).run(Command("Sleep", (sys.executable, "-c", sys.argv[2])))
"""


def test_an_interruption_leaves_no_process_behind(tmp_path: Path) -> None:
    words = [sys.executable, "-c", STORY, str(tmp_path), FAMILY]
    with subprocess.Popen(words, cwd=QUICKSTART, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        grandchild = next(int(line.split()[1]) for line in process.stdout if re.match(" +started [0-9]+$", line))
        os.kill(grandchild, 0)
        process.send_signal(signal.SIGINT)
        assert process.wait(30) != 0
    deadline = time.monotonic() + 10
    while _runs(grandchild):
        assert time.monotonic() < deadline, "a process was left behind"
        time.sleep(0.05)


def _runs(pid: int) -> bool:
    """Whether the process is there and no zombie (nobody may be there to bury an orphan)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
