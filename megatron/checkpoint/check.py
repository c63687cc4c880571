"""Whether the weights of a source are those of a model, told all at once and before anything is done with them.

It must not know model classes: what is expected are names and shapes.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from megatron.checkpoint.source import Source
from megatron.checkpoint.strided import BLOCK_BYTES
from megatron.model.families import family_of
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError


def check_weights(source: Source, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Raise one CheckpointError with every weight that is missing, unexpected or of another shape than expected.

    `expected` are the canonical names and shapes of the model (`canonical_shapes`). Buffers that old exports wrote
    (rotary frequencies, causal masks) are functions of the configuration and passed over, and so is the output layer of
    a model with tied embeddings if it equals the embedding.
    """
    found, family = source.shapes(), family_of(source.model_config)
    head, embedding = f"{family.head}.weight", f"{family.embedding}.weight"
    missing = sorted(expected.keys() - found.keys())
    unexpected = sorted(name for name in found.keys() - expected.keys() if not name.endswith(family.buffers))
    if head in unexpected and _is_copy(source, head, embedding):
        unexpected.remove(head)
    shapes = [
        f"{name} has shape {list(found[name])}, config.json makes it {list(shape)}"
        for name, shape in expected.items()
        if name in found and found[name] != tuple(shape)
    ]
    dtypes = {name: source.dtype(name) for name in expected if name in found}
    integers = [f"{name} ({dtype})" for name, dtype in dtypes.items() if not dtype.is_floating_point]
    parts = [
        _listed("missing", missing),
        _listed("unexpected", unexpected),
        _listed("of another shape", shapes),
        _listed("not floating point", integers),
    ]
    problems = "; ".join(part for part in parts if part)
    if problems:
        raise CheckpointError(f"The weights in {source.folder} are not those of its config.json: {problems}.")


def _is_copy(source: Source, name: str, other: str) -> bool:
    """Whether two stored matrices hold equal values; compares blocks of rows."""
    shapes = source.shapes()
    if shapes[name] != shapes.get(other) or source.dtype(name) != source.dtype(other):
        return False
    shape, dtype = shapes[name], source.dtype(name)
    rows = max(1, BLOCK_BYTES // max(1, shape[1] * dtype.itemsize))
    for row in range(0, shape[0], rows):
        size = (min(rows, shape[0] - row), shape[1])
        blocks = []
        for tensor in (name, other):
            blocks.append(torch.empty(size, dtype=dtype))
            source.read(Region(tensor, shape, (row, 0), size), blocks[-1])
        if not torch.equal(*blocks):
            return False
    return True


def _listed(what: str, items: list[str]) -> str:
    if not items:
        return ""
    more = f" and {len(items) - 8} more" if len(items) > 8 else ""
    return f"{len(items)} {what}: {', '.join(items[:8])}{more}"
