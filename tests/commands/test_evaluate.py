"""`megatron evaluate` on held-out data of every kind, against its definitions label by label."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from megatron.__main__ import main
from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.data.indexed import IndexedReader
from megatron.data.instruction.order import megatron_part
from megatron.data.instruction.pair import ConversationPair
from megatron.data.split import split_bounds
from megatron.evaluate.metrics import METRICS
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

SPLIT = "60,25,15"
SEED = 5
Run = Callable[..., dict[str, Any]]


@pytest.fixture(scope="module")
def folder(shared: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations and a corpus, and the checkpoint of a run on the former whose vocabulary has the markers."""
    folder = tmp_path_factory.mktemp("evaluate")
    answers = [
        "Rest and aspirin.",
        "No sign of harm, and no fever.",
        "A day in the ward will do, and then some more of it.",
    ]
    rows = [{"q": f"What helps patient {number}?" * (1 + number % 3), "a": answers[number % 3]} for number in range(14)]
    (folder / "in.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--input", folder / "in.jsonl", "--tokenizer", shared / "data/stories260K-untied", "--workers", 1]
    chat = ["--chat", "--chat-template", "megatron-llm", "--question-key", "q", "--answer-key", "a"]
    chat += ["--extra-tokens", "<|im_start|>,<|im_end|>", "--output-prefix", folder / "talks"]
    assert main(["preprocess", *map(str, [*words, *chat])]) == 0
    assert main(["preprocess", *map(str, [*words, "--json-keys", "q", "a", "--output-prefix", folder / "p"])]) == 0
    train = {
        "model.vocab_size": 514, "model.num_hidden_layers": 1, "train.global_batch": 2,
        "tokenizer.path": shared / "data/stories260K-untied", "data.kind": "instruction",
        "data.train": folder / "talks", "data.split": SPLIT, "data.seed": SEED, "data.prompt_loss_weight": 0.25,
        "data.sequence_length": 64, "train.steps": 1, "optimizer.warmup_steps": 0, "train.precision": "fp64",
        "checkpoint.save": folder / "save", "evaluate.metrics": "[instruct_accuracy]",
    }  # fmt: skip
    words = [str(word) for key, value in train.items() for word in (f"--{key}", value)]
    assert main(["train", "--config", "tiny", *words]) == 0
    return folder


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def evaluate(*words: str | Path) -> dict[str, Any]:
        capsys.readouterr()
        options = ["--load", folder / "save", "--precision", "fp64", "--micro-batch", "4"]
        assert main(["evaluate", *map(str, [*options, *words])]) == 0
        found: dict[str, Any] = json.loads(capsys.readouterr().out)
        return found

    return evaluate


@pytest.fixture(scope="module")
def model(folder: Path) -> Transformer:
    with open_source(folder / "save") as source:
        made = Transformer(ModelConfig.from_huggingface(source.model_config), single_rank(), torch.float64)
        load_weights(made, source)
    return made


@torch.no_grad()
def expected(model: Transformer, rows: Sequence[tuple[list[int], list[float]]]) -> dict[str, float]:
    """Of rows of tokens and the weights of their labels: every figure by its definition."""
    loss = weight_sum = correct = counted = correct_content = content = 0.0
    for tokens, weights in rows:
        logits = model(torch.tensor([tokens[:-1]]))[:, 0, :514]
        likely, best = logits.log_softmax(-1).tolist(), logits.argmax(-1).tolist()
        for at, (label, weight) in enumerate(zip(tokens[1:], weights, strict=True)):
            loss -= weight * likely[at][label]
            weight_sum += weight
            likeliest = weight > 0 and best[at] == label
            markup = any(token in (512, 513) for token in tokens[max(1, at - 1) : at + 2])
            counted, correct = counted + (weight > 0), correct + likeliest
            content, correct_content = (
                content + (weight > 0 and not markup),
                correct_content + (likeliest and not markup),
            )
    return {
        "loss": loss / weight_sum, "perplexity": math.exp(loss / weight_sum), "tokens": round(weight_sum),
        "accuracy": correct / counted, "instruct_accuracy": correct_content / max(1, content),
        "count_loss_mask": counted / len(rows), "count_instruct_mask": content / len(rows),
    }  # fmt: skip


def conversations(prefix: Path, part: int | None, prompt: float, length: int) -> list[tuple[list[int], list[float]]]:
    pair = ConversationPair(str(prefix))
    bounds = None if part is None else split_bounds(SPLIT, len(pair), "megatron-llm")[part : part + 2]
    found = []
    for number in megatron_part(len(pair), bounds, SEED)[0].tolist():
        tokens, roles = pair.read(number, length + 1)
        found.append((tokens.tolist(), [1.0 if role == 2 else prompt for role in roles[1:].tolist()]))
    return found


@pytest.mark.parametrize("packing", ["false", "true"])
def test_all_conversations_of_a_prefix(run: Run, folder: Path, model: Transformer, packing: str) -> None:
    words = ["--data", folder / "talks", "--metrics", *METRICS, "accuracy", "--data.packing", packing]
    wanted = expected(model, conversations(folder / "talks", None, 0.0, 128))
    if packing == "true":  # counts are per row
        del wanted["count_loss_mask"], wanted["count_instruct_mask"]
    found = run(*words)
    assert {name: found[name] for name in wanted} == pytest.approx(wanted, rel=1e-12)
    weighed = run("--data", folder / "talks", "--data.prompt_loss_weight", "0.25")
    assert weighed["loss"] == pytest.approx(expected(model, conversations(folder / "talks", None, 0.25, 128))["loss"])


@pytest.mark.parametrize(("name", "part"), [("validation", 1), ("test", 2)])
def test_a_part_of_the_split_of_a_run_is_found_in_its_checkpoint(
    run: Run, folder: Path, model: Transformer, name: str, part: int
) -> None:
    wanted = expected(model, conversations(folder / "talks", part, 0.25, 64))
    found = run("--split", name)
    assert set(found) == {"loss", "perplexity", "tokens", "instruct_accuracy"}, "the run's metrics"
    assert found == pytest.approx({key: wanted[key] for key in found}, rel=1e-12)


@pytest.mark.parametrize(("name", "part"), [("validation", 1), ("test", 2)])
def test_parts_of_token_streams(run: Run, folder: Path, model: Transformer, name: str, part: int) -> None:
    """Of two pairs, each and both."""
    prefixes = [str(folder / f"p_{key}_document") for key in ("q", "a")]
    by_source: dict[str, list[tuple[list[int], list[float]]]] = {}
    for prefix in prefixes:
        pair = IndexedReader(prefix)
        begin, end = split_bounds(SPLIT, len(pair), "megatron-llm")[part : part + 2]
        stream = np.concatenate([pair.read(number) for number in range(begin, end)]).tolist()
        windows = [stream[start : start + 33] for start in range(0, len(stream) - 1, 32)]
        by_source[Path(prefix).name] = [(window, [1.0] * (len(window) - 1)) for window in windows]
    words = ["--split", name, "--config", "tiny", "--data.train", json.dumps(prefixes), "--data.split", SPLIT]
    found = run(*words, "--sequence-length", "32", "--metrics", "accuracy")
    compared = [(found, [row for rows in by_source.values() for row in rows])]
    compared += [(found["sources"][source], read) for source, read in by_source.items()]
    for figures, read in compared:
        wanted = expected(model, read)
        assert all(figures[key] == pytest.approx(wanted[key], rel=1e-12) for key in ("loss", "tokens", "accuracy"))
    named = run("--split", name, "--config", "tiny", f"--data.{name}", json.dumps(prefixes), "--data.split", "null")
    assert named["tokens"] > found["tokens"], "data that are named are evaluated as a whole"


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (
            ["--split", "test", "--config", "tiny"],
            "there are no data for test: neither is data.test set, nor data.split",
        ),
        (["--split", "validation", "--data.split", "1,0,0"], "leaves no conversation of data.train for validation"),
        (["--split", "test", "--config", "tiny", "--data.test", "synthetic"], "data.test=synthetic has no end"),
        (["--split", "test", "--data", "x"], "not allowed with argument"),
        ([], "one of the arguments --data --split is required"),
        (["--data", "NOWHERE/x"], "no token data at"),
        (["--data", "CORPUS", "--metrics", "instruct_accuracy"], "does not have them"),
        (["--split", "test", "--nonsense"], "unrecognized arguments: --nonsense"),
        (["--split", "test", "--parallel.tensor", "2"], "needs 2 processes"),
    ],
)
def test_errors(folder: Path, words: list[str], hint: str, capsys: pytest.CaptureFixture[str], shared: Path) -> None:
    words = [word.replace("CORPUS", str(folder / "p_q_document")) for word in words]
    assert main(["evaluate", "--load", str(folder / "save"), *words]) == 2
    assert hint in capsys.readouterr().err
