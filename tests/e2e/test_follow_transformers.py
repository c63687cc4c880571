"""Twenty steps on any grid follow transformers + torch.optim.AdamW on the same samples, in float32.

Over these steps float32 itself moves the losses by about 1e-6, and each known fault by more than 2e-5.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from .material import Material, series, words
from .program import Program
from .reference import Recipe, megatron_samples, train_with_torch

LOSS_TOLERANCE = 1e-5  # absolute
NORM_TOLERANCE = 5e-5  # relative
RECIPE = Recipe()


@dataclass(frozen=True)
class Case:
    """A grid on `ranks` processes: the data ranks are what tensor and pipeline leave."""

    ranks: int = 1
    tensor: int = 1
    pipeline: int = 1
    sequence: bool | None = None
    zero: int | None = None
    micro_batch: int = 4

    def __str__(self) -> str:
        grid = f"tp{self.tensor}-pp{self.pipeline}-dp{self.ranks // self.tensor // self.pipeline}"
        sequence = {None: "", True: "-sequence", False: "-whole-sequences"}[self.sequence]
        return grid + sequence + ("" if self.zero is None else f"-zero{self.zero}") + f"-micro{self.micro_batch}"

    def settings(self) -> dict[str, Any]:
        values = {
            "parallel.tensor": self.tensor,
            "parallel.pipeline": self.pipeline,
            "parallel.sequence": None if self.sequence is None else str(self.sequence).lower(),
            "parallel.zero": self.zero,
            "train.micro_batch": self.micro_batch,
        }
        return {name: value for name, value in values.items() if value is not None}


CASES = [
    Case(),
    Case(micro_batch=1),
    Case(2, tensor=2, sequence=True),
    Case(2, tensor=2, sequence=False),
    Case(2, pipeline=2, micro_batch=2),
    Case(2, zero=0),
    Case(2, zero=1),
    Case(4, tensor=2, pipeline=2, sequence=True),
    Case(4, tensor=2, pipeline=2, sequence=False, micro_batch=2),
    Case(4, tensor=2, sequence=True, zero=1),
    Case(4, tensor=2, sequence=True, zero=0),
    Case(4, tensor=2, sequence=False, zero=1),
    Case(4, tensor=2, sequence=False, zero=0),
    Case(4, pipeline=2, zero=0, micro_batch=2),
    Case(4, pipeline=2, zero=1, micro_batch=1),
]
TIED_CASES = [
    Case(4, tensor=2, pipeline=2, micro_batch=2),
    Case(4, pipeline=2, zero=1, micro_batch=2),
    Case(4, tensor=4, micro_batch=8),
    Case(4, tensor=2, zero=1),
]
UNDER_TORCHRUN = [Case(2, tensor=2, micro_batch=8), Case(4, pipeline=2, micro_batch=2)]


Curves = tuple[NDArray[np.float64], NDArray[np.float64]]


@pytest.fixture(scope="module")
def expected(llama: Material) -> Curves:
    return train_with_torch(llama.model, megatron_samples(llama.data, RECIPE), RECIPE)


@pytest.fixture(scope="module")
def expected_of_random(random_llama: Material) -> Curves:
    return train_with_torch(random_llama.model, megatron_samples(random_llama.data, RECIPE), RECIPE)


def distance(log: Path, expected: Curves) -> tuple[float, float]:
    """(largest difference of a loss, largest relative difference of a gradient norm)."""
    losses, norms = series(log, "loss"), series(log, "grad_norm")
    assert series(log, "step").tolist() == list(range(1, RECIPE.steps + 1))
    return float(np.abs(losses - expected[0]).max()), float(np.abs(norms / expected[1] - 1).max())


def check(log: Path, expected: Curves) -> None:
    loss_distance, norm_distance = distance(log, expected)
    print(f"largest difference: loss {loss_distance:.1e}, gradient norm {norm_distance:.1e} relative")
    assert loss_distance <= LOSS_TOLERANCE
    assert norm_distance <= NORM_TOLERANCE


def command(material: Material, case: Case, log: Path) -> list[str]:
    return ["train", *words({**RECIPE.settings(material.model, material.data), **case.settings(), "log.dir": log})]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_grid_follows(program: Program, llama: Material, expected: Curves, case: Case, tmp_path: Path) -> None:
    program.run(command(llama, case, tmp_path), case.ranks)
    check(tmp_path, expected)


@pytest.mark.parametrize("case", TIED_CASES, ids=str)
def test_a_tied_embedding_follows(
    program: Program, random_llama: Material, expected_of_random: Curves, case: Case, tmp_path: Path
) -> None:
    """Three layers, an odd vocabulary, heads wider than hidden size / heads; tp 4 has more ranks than key heads.

    `deterministic` also fills fresh memory with NaN, which would show in a loss that depended on it.
    """
    program.run([*command(random_llama, case, tmp_path), "--train.deterministic", "true"], case.ranks)
    check(tmp_path, expected_of_random)


@pytest.mark.parametrize("case", UNDER_TORCHRUN, ids=str)
def test_torchrun_follows(program: Program, llama: Material, expected: Curves, case: Case, tmp_path: Path) -> None:
    ended = program.torchrun(command(llama, case, tmp_path), case.ranks)
    assert ended.returncode == 0, ended.stderr
    check(tmp_path, expected)


def test_clipping_and_warm_up_take_part(expected: Curves) -> None:
    """What is followed is a run in which clipping acts, and which learns."""
    losses, norms = expected
    assert (norms > RECIPE.clip_grad).any()
    assert losses[-3:].mean() < losses[:3].mean() - 0.3


@pytest.fixture(scope="module")
def plain_run(program: Program, llama: Material, expected: Curves, tmp_path_factory: pytest.TempPathFactory) -> Path:
    log = tmp_path_factory.mktemp("plain")
    program.run(command(llama, Case(), log))
    check(log, expected)
    return log


FAULTS: dict[str, tuple[Recipe, dict[str, Any]]] = {
    "rotary base x 2": (RECIPE, {"rope_parameters": {"rope_type": "default", "rope_theta": 20000.0}}),
    "eps 1e-6 for 1e-5": (RECIPE, {"rms_norm_eps": 1e-6}),
    "weight decay on norms": (RECIPE, {"decay_norms": True}),
    "no clipping": (replace(RECIPE, clip_grad=1e9), {}),
    "warm-up a step late": (replace(RECIPE, warmup_steps=4), {}),
    "second moment of 0.999": (replace(RECIPE, beta2=0.999), {}),
}


@pytest.mark.parametrize(("recipe", "changes"), FAULTS.values(), ids=FAULTS.keys())
def test_each_known_fault_would_be_seen(
    llama: Material, plain_run: Path, recipe: Recipe, changes: dict[str, Any]
) -> None:
    faulty = train_with_torch(llama.model, megatron_samples(llama.data, RECIPE), recipe, **changes)
    loss_distance, norm_distance = distance(plain_run, faulty)
    print(f"the fault moves: loss {loss_distance:.1e}, gradient norm {norm_distance:.1e} relative")
    assert loss_distance > 2 * LOSS_TOLERANCE


def test_other_samples_would_be_seen(llama: Material, plain_run: Path) -> None:
    samples = megatron_samples(llama.data, replace(RECIPE, seed=RECIPE.seed + 1))
    assert distance(plain_run, train_with_torch(llama.model, samples, RECIPE))[0] > 0.01
