"""Any grid gives the loss, every gradient and every weight of the one-rank model, in float64."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from typing import Any

import pytest

from megatron.kernels import native
from tests.dist.case import Case, Result, run_case
from tests.dist.compare import TOLERANCE, deviation
from tests.dist.pool import Pool

CASES = [
    Case("tp2", tensor=2),
    Case("tp2-sequence", tensor=2, sequence=True),
    Case("pp2", pipeline=2),
    Case("dp2", data=2),
    Case("dp2-zero", data=2, zero=1),
    Case("dp4-zero-within-2", data=4, zero=1, zero_within=2, micro_batches=2),
    Case("dp2-sharded", data=2, zero=3),
    Case("dp4-sharded", data=4, zero=3, micro_batches=2),
    Case("dp4-sharded-within-2", data=4, zero=3, zero_within=2, micro_batches=2),
    Case("tied-dp2-sharded-recompute", data=2, zero=3, tied=True, recompute="full"),
    Case(
        "dp2-sharded-one-micro-batch-recompute", data=2, zero=3, micro_batches=1, micro_batch=2, recompute="selective"
    ),
    Case("tp2-dp2-sharded", tensor=2, data=2, sequence=True, zero=3, recompute="full", recompute_layers=2),
    Case("tp2-dp2-sharded-one-key-value-head", tensor=2, data=2, zero=3, key_value_heads=1),
    Case("pp2-dp2-sharded", pipeline=2, data=2, zero=3, layers=5),
    Case("tied-pp2-dp2-sharded-gpipe", pipeline=2, data=2, zero=3, tied=True, schedule="gpipe"),
    Case("pp2-dp2-sharded-zero-bubble", pipeline=2, data=2, zero=3, schedule="zero_bubble", recompute="selective"),
    Case("tied-pp2-dp2-sharded-two-chunks", pipeline=2, data=2, zero=3, tied=True, schedule="interleaved", chunks=2),
    Case("cp2-dp2-sharded-within-2", context=2, data=2, zero=3, zero_within=2, documents=True),
    Case("gpt2-tied-dp2-sharded", data=2, zero=3, family="gpt2", tied=True),
    Case("gpt2-tied-pp2-dp2-sharded", pipeline=2, data=2, zero=3, family="gpt2", tied=True, recompute="full"),
    Case("pp2-recompute-some-layers", pipeline=2, layers=5, recompute="full", recompute_layers=2),
    Case("tied-one-stage-dp2-zero", data=2, zero=1, tied=True),
    Case("tied-pp2", pipeline=2, tied=True),
    Case("tp2-pp2-five-layers", tensor=2, pipeline=2, sequence=True, layers=5),
    Case("tp2-dp2-zero", tensor=2, data=2, sequence=True, zero=1),
    Case("tp2-dp2-plain", tensor=2, data=2),
    Case("tied-pp2-dp2-zero", pipeline=2, data=2, zero=1, tied=True),
    Case("tp4-above-key-value-heads", tensor=4, sequence=True, key_value_heads=2),
    Case("tp4-one-key-value-head", tensor=4, key_value_heads=1),
    Case("tp2-dp2-one-key-value-head-zero", tensor=2, data=2, sequence=True, zero=1, key_value_heads=1),
    Case("pp4-fewer-micro-batches", pipeline=4, micro_batches=2, micro_batch=2),
    Case("pp3-uneven", pipeline=3, layers=5, micro_batches=5),
    Case("tp2-pp2-one-micro-batch", tensor=2, pipeline=2, micro_batches=1, micro_batch=3, ragged=False),
    Case("tp4-wide-padding", tensor=4, vocabulary=65, sequence=True),
    Case("tp2-32017-tokens", tensor=2, vocabulary=32017, sequence=True),
    Case("tp4-32019-tokens-tied", tensor=4, vocabulary=32019, tied=True),
    Case("dp2-one-large-bucket", data=2, zero=1, bucket_elements=10**9, clip=0.0),
    Case("tp2-selective-recompute", tensor=2, sequence=True, recompute="selective"),
    Case("tp2-pp2-full-recompute", tensor=2, pipeline=2, sequence=True, recompute="full"),
    Case("gpt2-tp2", tensor=2, family="gpt2"),
    Case("gpt2-tp2-sequence-tied", tensor=2, sequence=True, family="gpt2", tied=True),
    Case("gpt2-tp2-pp2-recompute", tensor=2, pipeline=2, sequence=True, family="gpt2", recompute="selective"),
    Case("gpt2-tied-tp2-dp2-zero", tensor=2, data=2, sequence=True, zero=1, family="gpt2", tied=True),
    Case("gpt2-tied-pp2-zero-bubble", pipeline=2, family="gpt2", tied=True, schedule="zero_bubble"),
    Case("gpt-neox-tp2-sequence", tensor=2, sequence=True, family="gpt_neox"),
    Case("gpt-neox-tp2-pp2", tensor=2, pipeline=2, family="gpt_neox", recompute="full"),
    Case("llama3-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="llama3", documents=True),
    Case("mistral-tp2-pp2-documents", tensor=2, pipeline=2, sequence=True, family="mistral", documents=True),
    Case("mistral-cp2", context=2, context_attention="all_gather", family="mistral"),
    Case(
        "mistral-tp2-cp2-documents-recompute",
        tensor=2,
        context=2,
        context_attention="all_gather",
        family="mistral",
        documents=True,
        recompute="full",
    ),
    Case("qwen2-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="qwen2", tied=True),
    Case("qwen3-tp2-pp2", tensor=2, pipeline=2, family="qwen3", recompute="selective"),
    Case("qwen3-tp4-above-key-value-heads", tensor=4, sequence=True, family="qwen3", key_value_heads=2),
    Case("qwen3-tp2-dp2-sharded", tensor=2, data=2, zero=3, family="qwen3", recompute="full"),
    Case("falcon-7b-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="falcon-7b", tied=True),
    Case("falcon-7b-tp2-selective-recompute", tensor=2, family="falcon-7b", tied=True, recompute="selective"),
    Case("falcon-40b-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="falcon-40b", recompute="selective"),
    Case("falcon-40b-tp4-above-key-value-heads", tensor=4, family="falcon-40b", tied=True, recompute="full"),
    Case("falcon-11b-tp2-pp2", tensor=2, pipeline=2, family="falcon-11b", schedule="zero_bubble"),
    Case("falcon-11b-dp2-sharded", data=2, zero=3, family="falcon-11b", tied=True),
    Case("falcon-alibi-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="falcon-alibi", tied=True),
    Case("falcon-alibi-cp2-documents", context=2, family="falcon-alibi", documents=True, recompute="full"),
    Case(
        "falcon-alibi-tp2-cp2-documents",
        tensor=2,
        context=2,
        context_attention="all_gather",
        family="falcon-alibi",
        documents=True,
    ),
    Case("pythia-tp2-pp2", tensor=2, pipeline=2, sequence=True, family="pythia", recompute="selective"),
    Case("pythia-tp2-cp2-documents-zero", tensor=2, context=2, family="pythia", documents=True, zero=1),
    Case("llama-dynamic-pp2-cp2", pipeline=2, context=2, family="llama-dynamic", varied=True),
    Case("llama-yarn-tp2-cp2", tensor=2, context=2, family="llama-yarn", documents=True),
    Case("cp2", context=2),
    Case("cp2-all-gather", context=2, context_attention="all_gather"),
    Case("cp2-documents", context=2, documents=True, micro_batch=2, micro_batches=2),
    Case("cp4-one-key-value-head", context=4, key_value_heads=1),
    Case("cp4-documents", context=4, documents=True, micro_batch=2),
    Case("cp4-documents-all-gather", context=4, context_attention="all_gather", documents=True, key_value_heads=1),
    Case("dp2-documents", data=2, documents=True),
    Case("tp2-cp2-sequence-documents", tensor=2, context=2, sequence=True, documents=True, recompute="selective"),
    Case("tp2-cp2-one-key-value-head", tensor=2, context=2, key_value_heads=1, context_attention="all_gather"),
    Case("cp2-dp2-zero-documents-recompute", context=2, data=2, zero=1, documents=True, recompute="full"),
    Case("cp2-pp2-documents", context=2, pipeline=2, documents=True, tied=True),
    Case("cp2-pp2-zero-bubble", context=2, pipeline=2, zero=1, schedule="zero_bubble"),
    Case("tp2-pp2-documents-recompute", tensor=2, pipeline=2, documents=True, sequence=True, recompute="full"),
    Case("gpt2-tp2-cp2-documents", tensor=2, context=2, sequence=True, family="gpt2", documents=True),
    Case("tp2-pp2-weighted-varied", tensor=2, pipeline=2, sequence=True, weighted=True, varied=True),
    Case("tp2-cp2-weighted-varied", tensor=2, context=2, sequence=True, documents=True, weighted=True, varied=True),
    Case(
        "pp2-dp2-weighted-varied-chunks",
        pipeline=2,
        data=2,
        zero=1,
        schedule="interleaved",
        chunks=2,
        weighted=True,
        varied=True,
    ),
    Case("dp2-weighted-varied-sharded", data=2, zero=3, weighted=True, varied=True, recompute="full"),
    Case("pp2-two-chunks", pipeline=2, schedule="interleaved", chunks=2),
    Case("pp2-three-chunks-tied", pipeline=2, schedule="interleaved", chunks=3, layers=7, tied=True),
    Case("pp4-two-chunks", pipeline=4, schedule="interleaved", chunks=2, layers=9, micro_batches=8),
    Case("pp2-gpipe", pipeline=2, schedule="gpipe"),
    Case("pp2-zero-bubble", pipeline=2, schedule="zero_bubble"),
    Case("pp4-zero-bubble-few-micro-batches", pipeline=4, schedule="zero_bubble", micro_batches=2),
    Case("pp2-by-hand", pipeline=2, split=(1, 3)),
    Case("pp3-balanced", pipeline=3, layers=6, split="balanced"),
    Case(
        "tp2-pp2-two-chunks-recompute",
        tensor=2,
        pipeline=2,
        sequence=True,
        schedule="interleaved",
        chunks=2,
        recompute="full",
    ),
    Case(
        "tied-pp2-dp2-two-chunks-zero",
        pipeline=2,
        data=2,
        schedule="interleaved",
        chunks=2,
        zero=1,
        tied=True,
        layers=5,
        key_value_heads=1,
    ),
    Case("tp2-pp2-zero-bubble", tensor=2, pipeline=2, sequence=True, schedule="zero_bubble", recompute="selective"),
    Case("tied-pp2-dp2-zero-bubble-zero", pipeline=2, data=2, zero=1, tied=True, schedule="zero_bubble"),
    Case(
        "tp2-cp2-pp2-everything",
        tensor=2,
        context=2,
        pipeline=2,
        sequence=True,
        documents=True,
        zero=1,
        recompute="full",
        key_value_heads=1,
    ),
    Case(
        "tied-tp2-pp2-dp2-everything",
        tensor=2,
        pipeline=2,
        data=2,
        sequence=True,
        zero=1,
        tied=True,
        layers=5,
        key_value_heads=1,
        micro_batches=3,
    ),
]


# Plain gloo with the compiled kernels where there are some, the strict communicator with the references.
SETTINGS: dict[str, tuple[bool, native.Backend]] = {
    "gloo-native": (False, "auto"),
    "strict-reference": (True, "reference"),
}


@functools.cache
def one_rank(case: Case) -> Result:
    """The one-rank run in this process, always with the references: so both kinds of kernels are held to these."""
    try:
        return run_case(0, case, backend="reference")
    finally:
        native.select("auto", "cpu")


def runs() -> list[Any]:
    """Each case in one of the settings, in turns; in each of them under `make thorough`."""
    names = list(SETTINGS)
    return [
        pytest.param(case, *SETTINGS[name], id=f"{case.name}-{name}")
        for number, case in enumerate(CASES)
        for name in (names if os.environ.get("THOROUGH") else [names[number % len(names)]])
    ]


@pytest.mark.parametrize(("case", "strict", "backend"), runs())
def test_grid_equals_one_rank(case: Case, strict: bool, backend: native.Backend, pools: Callable[[int], Pool]) -> None:
    results = pools(case.grid.world_size).run(run_case, case, strict, None, backend)
    assert deviation(results, one_rank(case.one_rank)) <= TOLERANCE
