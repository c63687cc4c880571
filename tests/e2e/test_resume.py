"""Stop and resume: the same bits on the same grid, float32's noise on others, and only whole checkpoints count."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.utils.files import checksum_file

from .material import Material, read_metrics, series, words
from .program import Program, Result, Run, torchrun_command

STEPS = 16
INTERVAL = 5  # steps between checkpoints
REPEATABLE = ("step", "loss", "grad_norm", "learning_rate", "consumed_tokens", "validation_loss")

SHARDED = {"parallel.tensor": 2, "parallel.zero": 1}  # on 4 processes: tp 2 x dp 2
FULLY_SHARDED = {"parallel.zero": 3, "train.micro_batch": 1}
STAGES = {"parallel.pipeline": 2, "train.micro_batch": 1}  # on 2 processes


@dataclass(frozen=True)
class Job:
    """One training run: its folders and the command that starts it and resumes it alike."""

    program: Program
    material: Material
    folder: Path
    ranks: int
    settings: dict[str, Any]

    @property
    def save(self) -> Path:
        return self.folder / "save"

    @property
    def log(self) -> Path:
        return self.folder / "log"

    def command(self, **changes: Any) -> list[str]:
        values = {
            "model.init_from": self.material.model,
            "data.train": self.material.data,
            "data.validation": self.material.data,
            "data.sequence_length": 32,
            "optimizer.learning_rate": 3e-3,
            "optimizer.warmup_steps": 2,
            "train.steps": STEPS,
            "train.global_batch": 8,
            "train.micro_batch": 2,
            "train.precision": "fp32",
            "evaluate.interval": 4,
            "evaluate.batches": 1,
            "checkpoint.save": self.save,
            "checkpoint.interval": INTERVAL,
            "log.dir": self.log,
            "log.interval": 1,
            **self.settings,
            **{name.replace("__", "."): value for name, value in changes.items()},
        }
        return ["train", *words(values)]

    def start(self, **changes: Any) -> Run:
        return self.program.start(self.command(**changes), self.ranks)

    def run(self, expect: int = 0, **changes: Any) -> Result:
        return self.program.run(self.command(**changes), self.ranks, expect)

    def steps_logged(self) -> int:
        path = self.log / "metrics.jsonl"
        return path.read_text().count("\n") if path.exists() else 0

    def figures(self) -> list[dict[str, Any]]:
        """What does not depend on the machine's speed, bit for bit."""
        return [{name: line.get(name) for name in REPEATABLE} for line in read_metrics(self.log)]

    def newest(self) -> int:
        return int((self.save / "latest").read_text().strip().removeprefix("step_"))


MakeJob = Callable[..., Job]


@pytest.fixture(scope="module")
def finished(program: Program, random_llama: Material, tmp_path_factory: pytest.TempPathFactory) -> MakeJob:
    """`finished(ranks, settings)`: a run that nobody disturbed, made once for each grid. Not to be changed."""
    made: dict[str, Job] = {}

    def make(ranks: int, settings: dict[str, Any]) -> Job:
        key = f"{ranks} {settings}"
        if key not in made:
            job = Job(program, random_llama, tmp_path_factory.mktemp("finished"), ranks, settings)
            job.run()
            assert [line["step"] for line in read_metrics(job.log)] == list(range(1, STEPS + 1))
            made[key] = job
        return made[key]

    return make


@pytest.fixture
def fresh(program: Program, random_llama: Material, tmp_path: Path) -> MakeJob:
    """`fresh(ranks, settings)`: a run that has not started."""
    return lambda ranks, settings: Job(program, random_llama, tmp_path, ranks, settings)


def check_resumed(job: Job, undisturbed: Job, stopped_at: int) -> None:
    """The same command again completes the run, with the figures of the undisturbed one to the last bit."""
    again = job.run()
    assert f"all state of {job.save}/step_{stopped_at:07d}" in again.errors
    assert job.figures() == undisturbed.figures()
    assert job.newest() == STEPS


@pytest.mark.parametrize(
    ("ranks", "settings", "how"),
    [(4, SHARDED, "STOP file"), (4, SHARDED, "SIGTERM"), (2, STAGES, "SIGINT"), (2, STAGES, "SIGTERM")],
    ids=["STOP file, tp2 dp2", "SIGTERM to one of tp2 dp2", "SIGINT to all of pp2", "SIGTERM to the last of pp2"],
)
def test_a_wish_to_stop_saves_and_exits(
    fresh: MakeJob, finished: MakeJob, ranks: int, settings: dict[str, Any], how: str
) -> None:
    job = fresh(ranks, settings)
    run = job.start()
    run.wait_for(lambda: job.steps_logged() >= 3)
    wished_at = job.steps_logged()
    if how == "STOP file":
        (job.log / "STOP").touch()
    elif how == "SIGTERM":  # one process hears it, all stop
        os.kill(run.pids[-1], signal.SIGTERM)
    else:
        for pid in run.pids:
            os.kill(pid, signal.SIGINT)
    ended = run.wait()
    assert ended.codes == [0] * ranks, ended.errors
    stopped_at = job.newest()
    # A rank may hear of the wish while it ends the very step whose figures were seen.
    assert wished_at <= stopped_at < STEPS, "it stopped in the middle"
    assert stopped_at <= wished_at + 4, "and soon"
    assert f"stopped after step {stopped_at} ({'found' if how == 'STOP file' else f'received {how}'}" in ended.errors
    assert job.steps_logged() == stopped_at, "all ranks stopped after the step that is saved"
    assert not (job.log / "STOP").exists()
    check_resumed(job, finished(ranks, settings), stopped_at)


def test_kill_9_loses_only_what_came_after_the_checkpoint(fresh: MakeJob, finished: MakeJob) -> None:
    job = fresh(2, STAGES)
    run = job.start()
    run.wait_for(lambda: job.steps_logged() >= INTERVAL + 2)
    run.kill()
    saved, logged = job.newest(), job.steps_logged()
    assert saved % INTERVAL == 0 and saved < logged
    check_resumed(job, finished(2, STAGES), saved)


def test_kill_9_during_a_save(fresh: MakeJob, finished: MakeJob) -> None:
    job = fresh(2, STAGES)
    run = job.start(checkpoint__interval=1)
    run.wait_for(lambda: job.steps_logged() >= 3 and any(job.save.glob("*.partial")))
    run.kill()
    left = [folder.name for folder in job.save.glob("*.partial")]
    again = job.run()
    assert all(name in again.errors and "interrupted" in again.errors for name in left)
    assert job.figures() == finished(2, STAGES).figures()


def test_incomplete_folders_are_named_and_passed_over(fresh: MakeJob, finished: MakeJob) -> None:
    """Half a save, a file cut short, a list of files that is missing: the checkpoint before all these counts."""
    undisturbed, job = finished(2, STAGES), fresh(2, STAGES)
    shutil.copytree(undisturbed.save, job.save)
    shutil.copytree(undisturbed.log, job.log)
    half = job.save / "step_0000016.partial"
    (job.save / "step_0000016").rename(half)
    (half / "checkpoint.json").unlink()
    cut = next((job.save / "step_0000015").glob("optimizer-exp_avg-*.safetensors"))
    cut.write_bytes(cut.read_bytes()[:-100])
    (job.save / "step_0000010" / "checkpoint.json").unlink()
    again = job.run()
    assert f"all state of {job.save}/step_0000005" in again.errors
    for named in (half.name, "step_0000015", cut.name, "step_0000010", "checkpoint.json"):
        assert named in again.errors
    assert job.figures() == undisturbed.figures()
    assert job.newest() == STEPS


def change_a_byte(path: Path) -> None:
    """Damage that no size tells."""
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("ending", ["weights-00001", "optimizer-exp_avg_sq-00000"])
def test_a_damaged_file_is_named_and_the_checkpoint_before_it_taken(
    fresh: MakeJob, finished: MakeJob, ending: str
) -> None:
    """The ranks share the reading: whichever of them meets the damage, all pass the checkpoint over."""
    undisturbed, job = finished(2, STAGES), fresh(2, STAGES)
    shutil.copytree(undisturbed.save, job.save)
    shutil.copytree(undisturbed.log, job.log)
    for step in (STEPS, 15):
        change_a_byte(job.save / f"step_{step:07d}" / f"{ending}.safetensors")
    again = job.run(checkpoint__keep_last=1)
    assert f"all state of {job.save}/step_0000010" in again.errors
    warnings = [line for line in again.errors.splitlines() if "is ignored" in line]
    assert len(warnings) == 2
    for line, step in zip(warnings, (STEPS, 15), strict=True):
        assert f"step_{step:07d} is ignored" in line and f"{ending}.safetensors" in line
    assert job.figures() == undisturbed.figures()
    assert [path.name for path in job.save.glob("step_*")] == [f"step_{STEPS:07d}"], "made anew, in its place"


def test_a_run_whose_checkpoints_are_all_damaged_does_not_begin_anew(fresh: MakeJob, finished: MakeJob) -> None:
    job = fresh(2, STAGES)
    shutil.copytree(finished(2, STAGES).save, job.save)
    steps = sorted(path.name for path in job.save.glob("step_*"))
    for name in steps:
        change_a_byte(job.save / name / "weights-00000.safetensors")
    refused = job.run(expect=2)
    assert refused.errors.count("is ignored") == len(steps) > 1
    assert refused.errors.count("error:") == 1 and "each of them is damaged" in refused.errors
    assert sorted(path.name for path in job.save.glob("step_*")) == steps


@pytest.mark.parametrize("key", ["checkpoint.load", "model.init_from"])
def test_a_damaged_start_is_an_error_that_names_the_file(fresh: MakeJob, finished: MakeJob, key: str) -> None:
    job = fresh(2, STAGES)
    start = job.folder / f"step_{INTERVAL:07d}"
    shutil.copytree(finished(2, STAGES).save / start.name, start)
    change_a_byte(start / "optimizer-exp_avg-00001.safetensors")
    damaged = ["optimizer-exp_avg-00001.safetensors"]
    if key == "model.init_from":  # which does not read the moments
        job.run(checkpoint__save=job.folder / "elsewhere", train__steps=3, **{key.replace(".", "__"): start})
        change_a_byte(start / "weights-00000.safetensors")
        damaged = ["weights-00000.safetensors"]
    refused = job.run(expect=2, **{key.replace(".", "__"): start})
    assert refused.errors.count("error:") == 1
    assert f"{start} is damaged: the content of {', '.join(damaged)} is not" in refused.errors


def test_a_finished_run_has_nothing_to_do(fresh: MakeJob, finished: MakeJob) -> None:
    undisturbed, job = finished(2, STAGES), fresh(2, STAGES)
    shutil.copytree(undisturbed.save, job.save)
    shutil.copytree(undisturbed.log, job.log)
    assert f"nothing to do: step {STEPS}" in job.run().errors
    assert job.figures() == undisturbed.figures()


OTHER_GRIDS = {
    "tp1": (1, {}),
    "dp2": (2, {"parallel.zero": 0}),
    "pp2 dp2 zero": (4, {"parallel.pipeline": 2, "parallel.zero": 1}),
    "tp2 pp2": (4, {"parallel.tensor": 2, "parallel.pipeline": 2}),
    "tp4": (4, {"parallel.tensor": 4}),
    "cp2": (2, {"parallel.context": 2}),
    "tp2 cp2 gathered": (
        4,
        {"parallel.tensor": 2, "parallel.context": 2, "parallel.context_attention": "all_gather"},
    ),
    "dp2 fully sharded": (2, FULLY_SHARDED),
    "dp4 fully sharded within 2": (4, {**FULLY_SHARDED, "parallel.zero_within": 2}),
    "pp2 chunks": (2, {"parallel.pipeline": 2, "parallel.schedule": "interleaved", "parallel.chunks": 2}),
    "pp2 zero bubble": (2, {"parallel.pipeline": 2, "parallel.schedule": "zero_bubble", "parallel.layers": "[1, 3]"}),
}


@pytest.mark.parametrize(("ranks", "settings"), OTHER_GRIDS.values(), ids=OTHER_GRIDS.keys())
def test_another_grid_goes_on(fresh: MakeJob, finished: MakeJob, ranks: int, settings: dict[str, Any]) -> None:
    undisturbed, job = finished(4, SHARDED), fresh(ranks, settings)
    job.run(checkpoint__load=undisturbed.save / f"step_{INTERVAL:07d}")
    far = relative_distance(job, undisturbed)
    print(f"largest relative difference of a loss or gradient norm: {far:.1e}")
    assert far <= 1e-6


def test_what_chunks_saved_goes_on_without_them(fresh: MakeJob, finished: MakeJob) -> None:
    undisturbed, job = finished(2, OTHER_GRIDS["pp2 chunks"][1]), fresh(1, {})
    job.run(checkpoint__load=undisturbed.save / f"step_{INTERVAL:07d}")
    assert relative_distance(job, undisturbed) <= 1e-6


def test_what_full_sharding_saved_goes_on_whole_and_is_written_once(fresh: MakeJob, finished: MakeJob) -> None:
    undisturbed, job = finished(2, FULLY_SHARDED), fresh(1, {})
    start = undisturbed.save / f"step_{INTERVAL:07d}"
    job.run(checkpoint__load=start)
    assert relative_distance(job, undisturbed) <= 1e-6
    sizes = [(start / f"weights-{rank:05d}.safetensors").stat().st_size for rank in range(2)]
    assert max(sizes) < 0.6 * sum(sizes), "each rank writes its share of the weights"


DOCUMENTS = {"data.document_mask": "true"}


def test_split_sequences_with_documents_go_on_whole(fresh: MakeJob, finished: MakeJob) -> None:
    undisturbed, job = finished(4, {"parallel.context": 2, "parallel.zero": 1, **DOCUMENTS}), fresh(1, DOCUMENTS)
    job.run(checkpoint__load=undisturbed.save / f"step_{INTERVAL:07d}")
    assert relative_distance(job, undisturbed) <= 1e-6
    assert relative_distance(undisturbed, finished(4, SHARDED), first=1) > 1e-4, "the documents make no difference"


def relative_distance(job: Job, undisturbed: Job, first: int = INTERVAL + 1) -> float:
    """The largest relative difference of a loss, validation loss or gradient norm after the checkpoint."""
    expected = {line["step"]: line for line in read_metrics(undisturbed.log)}
    lines = read_metrics(job.log)
    assert [line["step"] for line in lines] == list(range(first, first + len(lines)))
    ratios = [
        line[name] / expected[line["step"]][name]
        for line in lines
        for name in ("loss", "grad_norm", "validation_loss")
        if name in line
    ]
    assert any("validation_loss" in line for line in lines)
    return max(abs(ratio - 1) for ratio in ratios)


@pytest.mark.parametrize("lost", ["exp_avg", "exp_avg_sq", "updates"])
def test_each_part_of_the_optimizer_matters(fresh: MakeJob, finished: MakeJob, lost: str) -> None:
    """Without either moment or the count of updates a resumed run is far outside what the tests above allow."""
    undisturbed, job = finished(4, SHARDED), fresh(1, {})
    damaged = job.folder / f"step_{INTERVAL:07d}"
    shutil.copytree(undisturbed.save / damaged.name, damaged)
    if lost == "updates":
        manifest = json.loads((damaged / "checkpoint.json").read_text())
        assert manifest["state"]["updates"] == INTERVAL
        manifest["state"]["updates"] = 0
        (damaged / "checkpoint.json").write_text(json.dumps(manifest))
    files = list(damaged.glob(f"optimizer-{lost}-*.safetensors"))
    assert len(files) == (0 if lost == "updates" else 4)
    for path in files:
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        content[start:] = bytes(len(content) - start)
        path.write_bytes(content)
    make_whole(damaged)
    run = job.start(checkpoint__load=damaged)
    run.wait_for(lambda: job.steps_logged() >= 4)
    (job.log / "STOP").touch()
    assert run.wait().codes == [0]
    assert relative_distance(job, undisturbed) > 1e-4


def test_bf16_resumes_to_the_last_bit(fresh: MakeJob, finished: MakeJob) -> None:
    """With fresh memory full of NaN (which `deterministic` sees to), so that nothing may depend on what it held."""
    settings = {**SHARDED, "train.precision": "bf16", "train.deterministic": "true"}
    undisturbed, job = finished(4, settings), fresh(4, settings)
    losses = series(undisturbed.log, "loss")
    assert np.abs(losses - series(finished(4, SHARDED).log, "loss")).max() < 0.05
    assert not any(line["grad_norm"] is None or "skipped_steps" in line for line in read_metrics(undisturbed.log))
    saved = undisturbed.save / f"step_{INTERVAL:07d}"
    job.run(checkpoint__load=saved)
    assert job.figures() == undisturbed.figures()[INTERVAL:]
    # The masters make it so: from the rounded weights other losses follow.
    rounded = job.folder / saved.name
    shutil.copytree(saved, rounded)
    forget_masters(rounded)
    job.run(checkpoint__load=rounded, checkpoint__save=job.folder / "elsewhere")
    assert job.figures() != undisturbed.figures()[INTERVAL:]


def forget_masters(step_folder: Path) -> None:
    """Zero the lower half of every master's bits, so that it is the rounded-down weight in bf16."""
    files = list(step_folder.glob("optimizer-master-*.safetensors"))
    assert len(files) == 4
    for path in files:
        content = bytearray(path.read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        values = np.frombuffer(content, dtype="<u4", offset=start)
        values &= np.uint32(0xFFFF0000)
        path.write_bytes(content)
    make_whole(step_folder)


def make_whole(step_folder: Path) -> None:
    """Have the checksums be those of the files as they are."""
    path = step_folder / "checkpoint.json"
    manifest = json.loads(path.read_text())
    for name, entry in manifest["files"].items():
        entry["xxh3_128"] = checksum_file(step_folder / name)
    path.write_text(json.dumps(manifest))


def test_changes_are_listed_and_apply(fresh: MakeJob, finished: MakeJob) -> None:
    undisturbed, job = finished(2, STAGES), fresh(2, STAGES)
    changed = job.run(
        checkpoint__load=undisturbed.save / f"step_{INTERVAL:07d}",
        optimizer__learning_rate=1e-3,
        optimizer__decay_style="constant",
        data__samples=STEPS * 8,
    )
    assert "optimizer.learning_rate" in changed.errors and "optimizer.decay_style" in changed.errors
    assert series(job.log, "learning_rate").tolist() == [1e-3] * (STEPS - INTERVAL)


REFUSED = {
    "data.samples": {"data__samples": STEPS * 8 + 1},
    "data.order": {"data__order": "stable"},
    "data.seed": {"data__seed": 5},
    "data.sequence_length": {"data__sequence_length": 16},
    "model.num_hidden_layers": {"model__num_hidden_layers": 5},
    # more steps mean another order, which the message has to say
    "data.samples was 128": {"train__steps": STEPS + 4},
}


@pytest.mark.parametrize("named", REFUSED)
def test_another_model_or_order_is_refused(fresh: MakeJob, finished: MakeJob, named: str) -> None:
    undisturbed, job = finished(2, STAGES), fresh(2, STAGES)
    shutil.copytree(undisturbed.log, job.log)
    load = undisturbed.save / f"step_{INTERVAL:07d}"
    refused = job.run(expect=2, checkpoint__load=load, **REFUSED[named])
    assert named in refused.errors and "Traceback" not in refused.errors
    assert not any(job.save.glob("step_*"))
    for name in ("config.yaml", "metrics.jsonl"):
        assert (job.log / name).read_text() == (undisturbed.log / name).read_text(), "what is there stays as it is"


def test_the_stable_order_may_be_extended(fresh: MakeJob) -> None:
    job = fresh(1, {"data.order": "stable", "optimizer.decay_steps": 30})
    job.run(train__steps=6)
    first = job.figures()
    job.run(train__steps=9)
    assert job.figures()[:6] == first and job.steps_logged() == 9
    whole = Job(job.program, job.material, job.folder / "whole", 1, job.settings)
    whole.run(train__steps=9, evaluate__interval=3)
    assert [line["loss"] for line in whole.figures()] == [line["loss"] for line in job.figures()]


def test_old_checkpoints_go(fresh: MakeJob) -> None:
    job = fresh(2, STAGES)
    job.run(checkpoint__keep_last=2, checkpoint__interval=3)
    assert sorted(path.name for path in job.save.iterdir()) == ["latest", "step_0000015", "step_0000016"]


@pytest.mark.parametrize("how", ["SIGTERM to torchrun", *(["Ctrl-C"] if os.environ.get("THOROUGH") else [])])
def test_under_torchrun(fresh: MakeJob, finished: MakeJob, how: str) -> None:
    """torchrun itself ends with an error when it is stopped; the checkpoint is whole all the same."""
    job = fresh(2, STAGES)
    # A session of its own, so that Ctrl-C, which goes to all processes of the terminal, does not reach this test.
    launcher = subprocess.Popen(
        torchrun_command(job.command(), 2), stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 60
    while job.steps_logged() < 3:
        assert time.monotonic() < deadline and launcher.poll() is None
        time.sleep(0.005)
    number = signal.SIGTERM if how.startswith("SIGTERM") else signal.SIGINT
    if number == signal.SIGTERM:
        os.kill(launcher.pid, number)
    else:
        os.killpg(launcher.pid, number)
    errors = launcher.communicate(timeout=60)[1]
    assert f"received {number.name}" in errors, errors
    check_resumed(job, finished(2, STAGES), job.newest())
