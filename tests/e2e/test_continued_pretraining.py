"""The main job on real input: a trained Llama learns medical text on one grid, goes on on another, and is exported."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import LlamaForCausalLM

from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.data.indexed import IndexedReader
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

from .material import guidelines, health_questions, pubmed_abstracts, read_metrics, words
from .program import Program

LENGTH = 256  # of the windows that are evaluated
FIRST_STEPS, ALL_STEPS = 40, 60

Evaluate = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def stories(shared: Path) -> Path:
    return shared / "data" / "stories260K-untied"


@pytest.fixture(scope="module")
def pairs(program: Program, stories: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Token pairs of medical documents: `train`, and `held`, every twentieth document, which is never trained on."""
    folder = tmp_path_factory.mktemp("medical")
    documents = [*guidelines(), *health_questions(), *pubmed_abstracts()]
    parts = {"held": documents[::20], "train": [text for at, text in enumerate(documents) if at % 20]}
    for name, texts in parts.items():
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{name}.jsonl").write_text("".join(lines))
        into = ["--output-prefix", folder / name, "--tokenizer", stories, "--append-eod", "--workers", 1]
        program.run(["preprocess", "--input", folder / f"{name}.jsonl", *into])
    return {name: folder / f"{name}_text_document" for name in parts}


@pytest.fixture(scope="module")
def evaluate(program: Program, pairs: dict[str, Path]) -> Evaluate:
    """`evaluate(folder, ranks=…, tensor=…)`: what `megatron evaluate` says of it on the held-out text."""

    def run(load: Path, ranks: int = 1, **grid: int) -> dict[str, Any]:
        where = ["--load", load, "--data", pairs["held"], "--sequence-length", LENGTH, "--micro-batch", 8]
        result = program.run(["evaluate", *where, *words(grid)], ranks)
        (line,) = result.output.splitlines()
        return json.loads(line)

    return run


@pytest.fixture(scope="module")
def trained(
    program: Program,
    stories: Path,
    pairs: dict[str, Path],
    evaluate: Evaluate,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, list[float]]:
    """The save folder of a run on tp 2 x pp 2, resumed on dp 2; and the held-out losses before, between and after."""
    folder = tmp_path_factory.mktemp("continued")
    settings = {
        "model.init_from": stories,
        "data.train": pairs["train"],
        "data.sequence_length": 128,
        "data.order": "stable",
        "optimizer.learning_rate": 4e-3,
        "optimizer.warmup_steps": 5,
        "optimizer.decay_steps": ALL_STEPS,
        "train.global_batch": 16,
        "train.micro_batch": 8,
        "train.precision": "fp32",
        "checkpoint.save": folder / "save",
        "log.dir": folder / "log",
        "log.interval": 20,
    }
    losses = [evaluate(stories)["loss"]]
    first = {**settings, "train.steps": FIRST_STEPS, "parallel.tensor": 2, "parallel.pipeline": 2}
    program.run(["train", *words(first)], ranks=4)
    losses.append(evaluate(folder / "save")["loss"])
    program.run(["train", *words({**settings, "train.steps": ALL_STEPS})], ranks=2)
    losses.append(evaluate(folder / "save")["loss"])
    assert [line["step"] for line in read_metrics(folder / "log")] == [20, 40, 60]
    return folder / "save", losses


@pytest.fixture(scope="module")
def exported(program: Program, trained: tuple[Path, list[float]], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "hf"
    program.run(["convert", trained[0], folder])
    return folder


def held_windows(pairs: dict[str, Path]) -> list[torch.Tensor]:
    """The held-out documents joined and cut into windows that share one token."""
    reader = IndexedReader(pairs["held"])
    stream = torch.cat([torch.from_numpy(reader.read(at).astype("int64")) for at in range(len(reader))])
    return [stream[start : start + LENGTH + 1] for start in range(0, len(stream) - 1, LENGTH)]


@torch.no_grad()
def loss_of_transformers(folder: Path, windows: list[torch.Tensor]) -> float:
    """Mean loss over all predictions, by transformers."""
    model, total, predictions = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32), 0.0, 0
    batches = [torch.stack(windows[at : min(at + 8, len(windows) - 1)]) for at in range(0, len(windows) - 1, 8)]
    for batch in [*batches, windows[-1][None]]:
        logits = model(batch[:, :-1]).logits
        total += F.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum").item()
        predictions += batch[:, 1:].numel()
    return total / predictions


def test_held_out_loss_drops_on_both_grids(trained: tuple[Path, list[float]]) -> None:
    before, between, after = trained[1]
    print(f"held-out loss: {before:.4f} before, {between:.4f} after tp 2 x pp 2, {after:.4f} after dp 2")
    assert 4.5 < before < 5.5, "the manifest says that it is bad at medical text"
    assert between < before - 1.8
    assert after < between - 0.04


def test_evaluation_is_the_same_on_any_grid(evaluate: Evaluate, stories: Path, pairs: dict[str, Path]) -> None:
    alone = evaluate(stories)
    assert alone["tokens"] == IndexedReader(pairs["held"]).num_tokens - 1
    grids: list[tuple[int, dict[str, int]]] = [
        (2, {}),
        (2, {"tensor": 2}),
        (2, {"context": 2}),
        (4, {"pipeline": 2}),
        (4, {"tensor": 2, "pipeline": 2}),
    ]
    for ranks, grid in grids:
        other = evaluate(stories, ranks, **grid)
        assert other["tokens"] == alone["tokens"]
        assert other["loss"] == pytest.approx(alone["loss"], rel=1e-7), (ranks, grid)


def test_evaluation_is_that_of_transformers(
    trained: tuple[Path, list[float]], exported: Path, stories: Path, pairs: dict[str, Path]
) -> None:
    windows = held_windows(pairs)
    assert loss_of_transformers(stories, windows) == pytest.approx(trained[1][0], abs=1e-5)
    assert loss_of_transformers(exported, windows) == pytest.approx(trained[1][-1], abs=1e-5)


@torch.no_grad()
def test_export_gives_the_same_logits_in_transformers(
    trained: tuple[Path, list[float]], exported: Path, pairs: dict[str, Path]
) -> None:
    with open_source(trained[0]) as source:
        assert source.step == ALL_STEPS
        ours = Transformer(ModelConfig.from_huggingface(source.model_config), single_rank())
        load_weights(ours, source)
    theirs = LlamaForCausalLM.from_pretrained(exported, dtype=torch.float32)
    tokens = torch.stack(held_windows(pairs)[:4])
    far = (ours(tokens).transpose(0, 1)[..., :512] - theirs(tokens).logits).abs().max().item()
    print(f"largest difference of a logit: {far:.1e}")
    assert far <= 1e-5


def test_export_carries_the_tokenizer(exported: Path, stories: Path) -> None:
    assert (exported / "tokenizer.model").read_bytes() == (stories / "tokenizer.model").read_bytes()


def test_round_trip_is_exact(program: Program, stories: Path, tmp_path: Path) -> None:
    """Hugging Face → native, cut for tp 2 x pp 2 → Hugging Face: the same bits under the same names."""
    program.run(["convert", stories, tmp_path / "native", "--tensor", 2, "--pipeline", 2])
    program.run(["convert", tmp_path / "native", tmp_path / "hf"])
    before, after = load_file(stories / "model.safetensors"), load_file(tmp_path / "hf" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor.view(torch.int32), after[name].view(torch.int32)) for name, tensor in before.items())


def test_another_tokenizer_is_noticed(program: Program, stories: Path, pairs: dict[str, Path], tmp_path: Path) -> None:
    """The pair knows which tokenizer made it, so a model with another one cannot be trained on it by mistake."""
    model = tmp_path / "model"
    program.run(["convert", stories, tmp_path / "native"])
    program.run(["convert", tmp_path / "native", model])
    (model / "tokenizer.model").write_bytes(
        (stories / "tokenizer.model").read_bytes().replace(b"\xe2\x96\x81the", b"\xe2\x96\x81teh", 1)
    )
    refused = program.run(
        ["train", *words({"model.init_from": model, "data.train": pairs["train"], "train.steps": 1})], expect=2
    )
    assert "another tokenizer" in refused.errors and "Traceback" not in refused.errors
