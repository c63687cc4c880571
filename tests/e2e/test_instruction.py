"""Fine-tuning on conversations: the same on every grid, whole or resumed, packed or not; and what it measures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron.data.indexed import IndexedWriter
from megatron.data.instruction.pair import ROLE_DTYPE, role_prefix, text_prefix

from .material import Material, read_metrics, series, words
from .program import Program

STEPS = 8
METRICS = ("perplexity", "accuracy", "instruct_accuracy", "count_loss_mask", "count_instruct_mask")
FIGURES = ("loss", "grad_norm", "consumed_tokens", "validation_loss", *(f"validation_{name}" for name in METRICS))


@pytest.fixture(scope="module")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Paragraphs as questions and answers in bytes, of 5 to 90 tokens; a few have a system's text, some two turns."""
    chance = np.random.default_rng(4)
    prefix = tmp_path_factory.mktemp("conversations") / "talk"
    text = (Path(__file__).resolve().parents[2] / "LICENSE").read_bytes()
    with (
        IndexedWriter(text_prefix(str(prefix)), "<u2") as tokens,
        IndexedWriter(role_prefix(str(prefix)), ROLE_DTYPE) as roles,
    ):
        for number in range(90):
            turns = [0, 1, 2] if number % 5 == 0 else [1, 2, 1, 2] if number % 7 == 0 else [1, 2]
            said, by = list[int](), list[int]()
            for role in turns:
                begin, length = int(chance.integers(len(text) - 50)), int(chance.integers(2, 26))
                message = [256, *text[begin : begin + length], 257]
                said += message
                by += [role] * len(message)
            for writer, values in ((tokens, said), (roles, by)):
                writer.add_sequence(values)
                writer.end_document()
    return prefix


@pytest.fixture(scope="module")
def model(random_llama: Material, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The random Llama with a tokenizer of single bytes, in which Megatron-LLM's tags are 256 and 257."""
    tokenizers = pytest.importorskip("tokenizers")
    folder = tmp_path_factory.mktemp("model")
    for file in random_llama.model.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE({piece: at for at, piece in enumerate(alphabet)}, []))
    tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder


def run(
    program: Program, model: Path, data: Path, folder: Path, ranks: int = 1, *, steps: int = STEPS, **settings: Any
) -> Path:
    values = {
        "model.init_from": model,
        "data.kind": "instruction",
        "data.train": data,
        "data.validation": data,
        "data.sequence_length": 64,
        "optimizer.learning_rate": 3e-3,
        "optimizer.decay_style": "constant",
        "train.steps": steps,
        "train.global_batch": 8,
        "train.micro_batch": 2,
        "train.precision": "fp64",
        "evaluate.interval": 4,
        "evaluate.batches": 3,
        "evaluate.metrics": json.dumps(list(METRICS)),
        "log.dir": folder / "log",
        "log.interval": 1,
        **{name.replace("__", "."): value for name, value in settings.items()},
    }
    program.run(["train", *words(values)], ranks)
    return folder / "log"


GRIDS = {
    "tp2 pp2": (4, {"parallel__tensor": 2, "parallel__pipeline": 2}),
    "dp2 cp2": (4, {"parallel__context": 2, "parallel__zero": 3}),
}


@pytest.mark.parametrize(
    ("packing", "names"), [(False, ["tp2 pp2"]), (True, ["tp2 pp2", "dp2 cp2"])], ids=["padded", "packed"]
)
def test_every_grid_trains_alike(
    program: Program, model: Path, conversations: Path, tmp_path: Path, packing: bool, names: list[str]
) -> None:
    settings = {"data__packing": str(packing).lower(), "data__prompt_loss_weight": 0.1 if packing else 0.0}
    plain = run(program, model, conversations, tmp_path / "plain", **settings)
    losses = series(plain, "loss")
    assert len(losses) == STEPS and losses[-1] < losses[0] - 0.1
    for name in names:
        ranks, grid = GRIDS[name]
        other = run(program, model, conversations, tmp_path / name, ranks, **settings, **grid)
        for mine, theirs in zip(read_metrics(plain), read_metrics(other), strict=True):
            for figure in FIGURES:
                assert (figure in mine) == (figure in theirs)
                if figure in mine:
                    assert theirs[figure] == pytest.approx(mine[figure], rel=1e-9), (name, mine["step"], figure)
    last = read_metrics(plain)[-1]
    assert last["validation_perplexity"] == pytest.approx(np.exp(last["validation_loss"]))
    assert 0 < last["validation_count_instruct_mask"] < last["validation_count_loss_mask"]


@pytest.mark.parametrize(
    ("order", "packing"), [("megatron", "false"), ("stable", "true")], ids=["megatron padded", "stable packed"]
)
def test_a_run_that_was_stopped_within_an_epoch_goes_on_to_the_same_figures(
    program: Program, model: Path, conversations: Path, tmp_path: Path, order: str, packing: str
) -> None:
    settings = {"data__order": order, "data__packing": packing, "train__precision": "fp32"}
    whole = run(program, model, conversations, tmp_path / "whole", **settings)
    settings["checkpoint__save"] = tmp_path / "save"
    for steps in (3, STEPS):  # extended, which changes nothing in either order
        parts = run(program, model, conversations, tmp_path / "parts", steps=steps, **settings)
    mine, theirs = ([{name: line.get(name) for name in ("step", *FIGURES[:3])} for line in read_metrics(log)]
                    for log in (whole, parts))  # fmt: skip
    assert mine == theirs and len(mine) == STEPS


def test_what_does_not_go_with_conversations_is_said(
    program: Program, model: Path, conversations: Path, random_llama: Material, tmp_path: Path
) -> None:
    def refused(**settings: Any) -> str:
        values = {"model.init_from": model, "data.train": conversations, "data.kind": "instruction", "train.steps": 1}
        values |= {name.replace("__", "."): value for name, value in settings.items()}
        result = program.run(["train", *words(values)], expect=2)
        assert "Traceback" not in result.errors
        return result.errors

    said = refused(
        data__document_mask="true", data__packing="true", data__validation="synthetic", kernels__attention="eager"
    )
    assert "conversations never see each other" in said and "random tokens have no roles" in said
    assert "kernels.attention=eager with data.packing=true" in said
    said = refused(data__kind="pretraining", data__packing="true", evaluate__metrics="[accuracy, speed]")
    assert "must be one of perplexity" in said
    assert "is a pair of plain token data" in refused(data__train=random_llama.data)
    assert "use data.kind=instruction for these" in refused(data__kind="pretraining")
    (model.parent / "bare").mkdir()
    for file in random_llama.model.iterdir():
        (model.parent / "bare" / file.name).write_bytes(file.read_bytes())
    answer = refused(
        model__init_from=model.parent / "bare", data__validation=conversations, evaluate__interval=1,
        evaluate__metrics="[instruct_accuracy]",
    )  # fmt: skip
    assert "no tokenizer is known: name it in tokenizer.path" in answer
