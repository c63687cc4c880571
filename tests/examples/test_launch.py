"""The launch scripts, run with stand-ins for torchrun and Slurm's commands that record how they were called."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

from megatron.config.load import load_config
from megatron.config.overrides import split_overrides
from megatron.config.validate import validate_grid

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
SCRIPTS = sorted([*EXAMPLES.rglob("*.sh"), *EXAMPLES.rglob("*.sbatch")])
WORLD_SIZES = {"single_node/config.yaml": 8, "slurm/config-7b.yaml": 64, "slurm/config-70b.yaml": 128}

STAND_INS = {
    "torchrun": 'printf "%s\\n" "$@" > "$RECORD/torchrun"; eval "${TRAINING:-true}"',
    "srun": 'while [ "$1" != torchrun ]; do echo "$1" >> "$RECORD/srun"; shift; done; exec "$@"',
    "scontrol": 'if [ "$1" = show ]; then printf "node7\\nnode8\\n"; else echo "$*" > "$RECORD/scontrol"; fi',
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A copy of examples/ in a folder of its own, with the stand-ins in bin/ and a folder for their records."""
    shutil.copytree(EXAMPLES, tmp_path / "examples")
    (tmp_path / "bin").mkdir()
    (tmp_path / "record").mkdir()
    for name, body in STAND_INS.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\nset -u\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def environment(place: Path, **more: str) -> dict[str, str]:
    path = f"{place / 'bin'}:{os.environ['PATH']}"
    slurm = {
        "SLURM_SUBMIT_DIR": str(place),
        "SLURM_JOB_ID": "123456",
        "SLURM_JOB_NODELIST": "node[7-8]",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_CPUS_PER_TASK": "64",
    }
    return os.environ | slurm | {"PATH": path, "RECORD": str(place / "record")} | more


def start_job(place: Path, config: str, *words: str, training: str = "true") -> subprocess.Popen[bytes]:
    script = str(place / "examples" / "slurm" / "train.sbatch")
    command = ["bash", script, config, *words]
    return subprocess.Popen(command, cwd="/", env=environment(place, TRAINING=training), stderr=subprocess.PIPE)


def launched(place: Path) -> list[str]:
    return (place / "record" / "torchrun").read_text().splitlines()


def option(words: list[str], name: str) -> str:
    return words[words.index(name) + 1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_a_script_is_bash_and_can_be_run(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)
    assert os.access(script, os.X_OK)
    text = script.read_text()
    assert text.startswith("#!/usr/bin/env bash\n")
    assert "set -euo pipefail" in text


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck, which is not installed")
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_has_nothing_to_say(script: Path) -> None:
    subprocess.run(["shellcheck", "--shell=bash", str(script)], check=True)


@pytest.mark.parametrize("name", sorted(WORLD_SIZES))
def test_a_configuration_fits_its_cluster(name: str) -> None:
    words = ["--log.dir", "runs/x", "--checkpoint.save", "runs/x/checkpoints"]
    validate_grid(load_config(str(EXAMPLES / name), words), WORLD_SIZES[name])


def test_all_configurations_are_tested() -> None:
    folders = ("single_node", "slurm")
    found = {str(path.relative_to(EXAMPLES)) for folder in folders for path in (EXAMPLES / folder).glob("*.yaml")}
    assert found == set(WORLD_SIZES)
    assert all((EXAMPLES / folder / "README.md").is_file() for folder in folders)


def test_the_installed_launcher_understands_what_it_is_given(place: Path) -> None:
    from torch.distributed.run import get_args_parser

    with start_job(place, "examples/slurm/config-7b.yaml", "--train.steps", "5") as job:
        assert job.wait(30) == 0
    parsed = get_args_parser().parse_args(launched(place))
    assert (parsed.nnodes, parsed.nproc_per_node, parsed.max_restarts) == ("2", "8", 0)
    assert (parsed.shutdown_timeout, parsed.module, parsed.training_script) == (600, True, "megatron")
    assert parsed.training_script_args[0] == "train"


def test_one_node_hands_its_words_to_the_trainer(place: Path) -> None:
    script = place / "examples" / "single_node" / "launch.sh"
    subprocess.run([script, "--train.steps", "5"], cwd="/", env=environment(place), check=True)
    words = launched(place)
    assert "--standalone" in words
    assert words[words.index("-m") :][:3] == ["-m", "megatron", "train"]
    overrides, rest = split_overrides(words[words.index("train") + 1 :])
    assert rest == ["--config", "examples/single_node/config.yaml"]
    assert load_config(str(EXAMPLES / "single_node" / "config.yaml"), overrides).train.steps == 5


def test_a_job_starts_one_launcher_per_node(place: Path) -> None:
    with start_job(place, "examples/slurm/config-7b.yaml", "--train.steps", "5") as job:
        assert job.wait(30) == 0
    words = launched(place)
    assert (option(words, "--nnodes"), option(words, "--nproc-per-node")) == ("2", "8")
    assert option(words, "--rdzv-endpoint") == "node7:23456"
    assert option(words, "--rdzv-id") == "123456-0"
    assert option(words, "--log.dir") == "runs/config-7b"
    assert words[-2:] == ["--train.steps", "5"]
    assert (place / "runs" / "config-7b").is_dir()
    assert "--cpus-per-task=64" in (place / "record" / "srun").read_text()
    assert not (place / "record" / "scontrol").exists(), "a run that is done must not be requeued"


def test_a_failed_run_ends_the_job_with_its_exit_code(place: Path) -> None:
    with start_job(place, "examples/slurm/config-7b.yaml", training="exit 3") as job:
        assert job.wait(30) == 3
    assert not (place / "record" / "scontrol").exists()


@pytest.mark.parametrize(("ending", "code", "requeued"), [("exit 0", 0, True), ("exit 4", 4, False)])
def test_when_the_time_is_over_training_is_asked_to_stop_and_the_job_requeued(
    place: Path, ending: str, code: int, requeued: bool
) -> None:
    stop = place / "runs" / "config-70b" / "STOP"
    stop.parent.mkdir(parents=True)
    stop.touch()  # left over from the run before: not meant for this one
    # Training goes on until it finds the stop file, then takes a moment to save.
    training = (
        f"[ ! -e {stop} ] || exit 9; touch $RECORD/going; "
        f"while [ ! -e {stop} ]; do sleep 0.05; done; rm {stop}; sleep 0.5; {ending}"
    )
    with start_job(place, "examples/slurm/config-70b.yaml", training=training) as job:
        deadline = time.monotonic() + 30
        while not (place / "record" / "going").exists():
            assert job.poll() is None and time.monotonic() < deadline, "the job did not start"
            time.sleep(0.02)
        job.send_signal(signal.SIGUSR1)
        assert job.wait(30) == code
    record = place / "record" / "scontrol"
    assert (record.read_text() if record.exists() else None) == ("requeue 123456\n" if requeued else None)


def test_the_signal_comes_before_the_save_would_be_cut_off() -> None:
    text = (EXAMPLES / "slurm" / "train.sbatch").read_text()
    assert "\n#SBATCH --signal=B:USR1@600\n" in text
    # Slurm reads its options only above the first command.
    first_command = text.index("\nset -euo pipefail")
    assert text.rindex("\n#SBATCH ") < first_command
