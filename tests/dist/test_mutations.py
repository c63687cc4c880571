"""The mutation twins of the equivalence tests: break one thing, and the check must fail."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.dist.case import Case, run_case
from tests.dist.compare import TOLERANCE, deviation
from tests.dist.mutations import MUTATIONS
from tests.dist.pool import Pool, WorkerError

TENSOR = Case("tp2", tensor=2)
SEQUENCE = Case("tp2-sequence", tensor=2, sequence=True)
DATA = Case("dp2", data=2)
ZERO = Case("dp2-zero", data=2, zero=1)
SHARDED = Case("dp2-sharded", data=2, zero=3)
COPIED = Case("dp4-sharded-within-2", data=4, zero=3, zero_within=2)
COPIED_STATE = Case("dp4-zero-within-2", data=4, zero=1, zero_within=2)
UNCLIPPED = Case("dp2-unclipped", data=2, clip=0.0)  # clipping would make up for a wrong scale
PIPELINE = Case("pp2", pipeline=2)
CHUNKS = Case("pp2-four-chunks", pipeline=2, schedule="interleaved", chunks=4, layers=8)
ZERO_BUBBLE = Case("pp2-zero-bubble", pipeline=2, schedule="zero_bubble")
TIED = Case("tied-pp2", pipeline=2, tied=True)
GPT = Case("gpt2-tp2", tensor=2, family="gpt2")
GPT_SEQUENCE = Case("gpt2-tp2-sequence", tensor=2, sequence=True, family="gpt2")
CONTEXT = Case("cp2", context=2)
GATHERED = Case("cp2-all-gather", context=2, context_attention="all_gather")
DOCUMENTS = Case("cp2-documents", context=2, documents=True)
ADAPTERS = Case("tp2-adapters", tensor=2, lora_rank=3)
ADAPTERS_SEQUENCE = Case("tp2-sequence-adapters", tensor=2, sequence=True, lora_rank=3)
KEY_VALUE_COPIES = Case("tp2-one-key-value-head", tensor=2, key_value_heads=1)

# (mutation, case, strict communicator)
TWINS = [
    ("column-backward-not-reduced", TENSOR, False),
    ("row-forward-not-reduced", TENSOR, False),
    ("row-forward-not-reduced", SEQUENCE, False),
    ("sequence-gradient-not-summed", SEQUENCE, False),
    ("sequence-not-gathered", SEQUENCE, False),
    ("loss-statistics-not-reduced", TENSOR, False),
    ("data-gradients-not-reduced", DATA, False),
    ("copies-not-summed", SEQUENCE, False),
    ("copies-not-summed", KEY_VALUE_COPIES, False),
    ("copies-not-summed", TIED, False),
    ("copies-not-summed", GPT_SEQUENCE, False),
    ("row-bias-added-on-every-rank", GPT, False),
    ("row-bias-added-on-every-rank", GPT_SEQUENCE, False),
    ("positions-of-the-first-share", GPT_SEQUENCE, False),
    ("updated-weights-not-gathered", ZERO, False),
    ("weights-of-the-last-step-kept", SHARDED, False),
    ("weights-not-gathered-for-the-backward-pass", SHARDED, False),
    ("gradients-of-the-last-micro-batch-only", SHARDED, False),
    ("replicas-not-summed", COPIED, False),
    ("replicas-not-summed", COPIED_STATE, False),
    ("replicas-counted-in-norm", COPIED, False),
    ("gradients-of-a-layer-not-waited", SHARDED, True),
    ("weights-not-waited", SHARDED, True),
    ("norm-not-reduced", PIPELINE, False),
    ("norm-not-reduced", ZERO, False),
    ("copies-counted-in-norm", TIED, False),
    ("copies-counted-in-norm", KEY_VALUE_COPIES, False),
    ("loss-totals-not-reduced", DATA, False),
    ("gradients-not-divided-by-tokens", UNCLIPPED, False),
    ("padding-in-the-softmax", TENSOR, False),
    ("padding-gets-gradient", TENSOR, False),
    ("adapter-gradient-not-summed", ADAPTERS, False),
    ("adapter-gradient-not-summed", ADAPTERS_SEQUENCE, False),
    ("row-forward-not-reduced", ADAPTERS, False),
    ("copies-not-summed", ADAPTERS_SEQUENCE, False),
    ("head-gradient-not-reduced", TENSOR, False),
    ("head-gradient-not-reduced", SEQUENCE, False),
    ("gradients-of-the-last-step-kept", DATA, False),
    ("column-backward-not-waited", SEQUENCE, True),
    ("inputs-gathered-not-waited", SEQUENCE, True),
    ("data-gradients-not-waited", DATA, True),
    ("weights-not-waited", ZERO, True),
    ("message-not-waited", PIPELINE, True),
    ("message-around-the-ring-not-waited", CHUNKS, True),
    ("sent-buffer-reused", PIPELINE, True),
    ("ring-not-waited", CONTEXT, True),
    ("ring-results-added", CONTEXT, False),
    ("key-gradients-of-others-dropped", CONTEXT, False),
    ("gathered-key-gradients-not-summed", GATHERED, False),
    ("keys-gathered-in-rank-order", GATHERED, False),
    ("positions-of-the-first-part", CONTEXT, False),
    ("tokens-of-another-part", CONTEXT, False),
    ("data-gradients-not-reduced", CONTEXT, False),
    ("loss-totals-not-reduced", CONTEXT, False),
    ("documents-ignored", DOCUMENTS, False),
    ("documents-of-another-part", DOCUMENTS, False),
    ("weight-products-dropped", ZERO_BUBBLE, False),
    ("weight-products-of-another-micro-batch", ZERO_BUBBLE, False),
    ("chunks-swapped", CHUNKS, False),
]


def test_every_mutation_has_a_twin() -> None:
    assert {mutation for mutation, _, _ in TWINS} == set(MUTATIONS)


@pytest.mark.parametrize(
    ("mutation", "case", "strict"), TWINS, ids=[f"{mutation}-{case.name}" for mutation, case, _ in TWINS]
)
def test_broken_program_is_noticed(mutation: str, case: Case, strict: bool, pools: Callable[[int], Pool]) -> None:
    reference = run_case(0, case.one_rank)
    try:
        found = deviation(pools(case.grid.world_size).run(run_case, case, strict, mutation), reference)
    except WorkerError as error:
        assert "AssertionError" in str(error), error  # one of the program's own checks, not a broken mutation
        return
    except AssertionError:
        return  # an exact rule was broken
    # Far above the tolerance, so that noise cannot be taken for a find.
    assert found > 1e3 * TOLERANCE
