"""Metrics against their definitions on logits that are all there at once, and on grids against one rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from megatron.config.evaluate import MetricName
from megatron.data.dataset import PADDING
from megatron.evaluate.metrics import METRICS, Markers, in_markup
from megatron.evaluate.perplexity import Evaluation, evaluate
from megatron.kernels.runs import Documents
from megatron.model.config import ModelConfig
from megatron.model.initialize import initialize
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import Grid, connect, single_rank
from tests.dist.pool import Pool, pools

__all__ = ["pools"]

MODEL = ModelConfig(50, 24, 40, 2, 4, 2, 6, initializer_range=0.6)
MARKERS = Markers(48, 49)
ALL = tuple(METRICS)


class Rows:
    """Seeded rows of 8 predictions with markers among them; some end early."""

    def __init__(self, count: int) -> None:
        self._count = count

    def __len__(self) -> int:
        return self._count

    def sample(self, index: int) -> NDArray[np.int64]:
        row = np.random.default_rng(index).integers(0, 50, 9)
        row[2 + index % 4] = 48 + index % 2
        row[9 - index % 3 :] = PADDING
        return row

    def boundaries(self, index: int) -> NDArray[np.int64]:
        return np.array([3], dtype=np.int64)

    def source(self, index: int) -> str:
        return "here"


def make_model(context: object = None) -> Transformer:
    model = Transformer(MODEL, context or single_rank(), torch.float64)  # type: ignore[arg-type]
    initialize(model, MODEL, 7)
    return model


def expected_figures(count: int, document_mask: bool = False) -> dict[str, float]:
    """Label by label, in plain Python."""
    model, rows = make_model(), Rows(count)
    losses, correct, counted, content = 0.0, [0, 0], 0, 0
    for index in range(count):
        row = rows.sample(index)
        documents = Documents(torch.tensor([[0, 0, 0, 3, 3, 3, 3, 3]], dtype=torch.int32), 2)
        tokens = torch.from_numpy(np.where(row < 0, 0, row))[None, :-1]
        logits = model(tokens, documents=documents if document_mask else None)[:, 0, :50]
        for at, label in enumerate(row[1:].tolist()):
            if label == PADDING:
                continue
            likeliest = int(logits[at].argmax()) == label
            losses -= logits[at].log_softmax(-1)[label].item()
            markup = any(
                row[1 + before] in (48, 49) and not (document_mask and before < 3 <= at)
                for before in range(max(0, at - 2), at + 1)
            )
            counted, content = counted + 1, content + (not markup)
            correct = [correct[0] + likeliest, correct[1] + (likeliest and not markup)]
    return {
        "perplexity": math.exp(losses / counted),
        "accuracy": correct[0] / counted,
        "instruct_accuracy": correct[1] / content,
        "count_loss_mask": counted / count,
        "count_instruct_mask": content / count,
    }


def alone(text: str) -> list[str]:
    return [text]


@pytest.mark.parametrize(("count", "micro_batch", "micro_batches"), [(1, 1, 1), (7, 3, 1), (12, 2, 3), (5, 2, 2)])
@pytest.mark.parametrize("document_mask", [False, True])
def test_metrics_are_what_they_are_defined_to_be(
    count: int, micro_batch: int, micro_batches: int, document_mask: bool
) -> None:
    found = evaluate(
        make_model(), Rows(count), alone, micro_batch=micro_batch, micro_batches=micro_batches,
        document_mask=document_mask, metrics=ALL, markers=MARKERS,
    )  # fmt: skip
    assert found.metrics == pytest.approx(expected_figures(count, document_mask), rel=1e-12)
    plain = evaluate(make_model(), Rows(count), alone, micro_batch=1, document_mask=document_mask)
    assert found.loss == pytest.approx(plain.loss, rel=1e-13) and found.tokens == plain.tokens and plain.metrics == {}
    assert found.metrics["perplexity"] == pytest.approx(found.perplexity, rel=1e-13)


def _on_grid(rank: int, grid: Grid, sequence: bool, document_mask: bool) -> Evaluation:
    context = connect(grid, rank, sequence=sequence, num_key_value_heads=2)
    # One rank's rows more than fill a round, so that a micro-batch of nothing but filling is among them.
    texts: Callable[[str], list[str]] = lambda text: [text] * grid.world_size  # noqa: E731 - nobody fails here
    return evaluate(
        make_model(context), Rows(9), texts, micro_batch=2, micro_batches=2, document_mask=document_mask,
        metrics=ALL, markers=MARKERS,
    )  # fmt: skip


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize(
    ("grid", "sequence"),
    [(Grid(tensor=2, pipeline=2), True), (Grid(tensor=2, data=2), False), (Grid(context=2, data=2), False)],
    ids=["tp2-pp2", "tp2-dp2", "cp2-dp2"],
)
def test_metrics_are_the_same_on_every_grid(
    pools: Callable[[int], Pool], grid: Grid, sequence: bool, document_mask: bool
) -> None:
    expected = expected_figures(9, document_mask)
    for found in pools(grid.world_size).run(_on_grid, grid, sequence, document_mask):
        assert found.metrics == pytest.approx(expected, rel=1e-11)


def test_markup_is_a_marker_and_the_two_labels_behind_it() -> None:
    labels = torch.tensor([[48, 1, 2, 3, 49, 4, 5, 6], [1, 1, 1, 1, 1, 1, 49, 1], [1, 49, 48, 1, 1, 1, 1, 1]])
    assert in_markup(labels, None, MARKERS).int().tolist() == [
        [1, 1, 1, 0, 1, 1, 1, 0],
        [0, 0, 0, 0, 0, 0, 1, 1],
        [0, 1, 1, 1, 1, 0, 0, 0],
    ]


def test_what_can_be_asked_for_is_what_is_registered() -> None:
    assert set(get_args(MetricName)) == set(METRICS)
