"""What one operation costs in numbers that do not depend on the hardware: FLOPs, bytes moved, shape of its product."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

# Allocations and views in disguise: they move nothing.
_FREE = frozenset({"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "_unsafe_view", "set_"})


@dataclass(frozen=True)
class Operation:
    """One operation. `flops` are those of matrix products (2 · m · n · k); `product` is (batch, m, n, k) where it is a
    single product, for how well it fills the hardware; `bytes` are read and written once each."""

    name: str
    flops: float
    bytes: float
    product: tuple[int, int, int, int] | None = None
    attention: bool = False


def describe(func: Any, args: Any, kwargs: Any, result: Any) -> Operation | None:
    """The operation that a dispatched call is; None for one that does nothing on the device."""
    name = func._schema.name.partition("::")[2]
    if name in _FREE or _is_view(func):
        return None
    moved = sum(map(_bytes, (*tree_leaves((args, kwargs)), *tree_leaves(result))))
    if name in _ATTENTION:
        return Operation(name, _ATTENTION[name](*args), moved, attention=True)
    product = _product(name, args)
    if product is not None:
        return Operation(name, 2.0 * math.prod(product), moved, product)
    formula = flop_registry.get(func.overloadpacket)
    flops = float(formula(*args, **kwargs, out_val=result)) if formula is not None else 0.0
    return Operation(name, flops, moved)


def _is_view(func: Any) -> bool:
    """Whether the result only looks at the arguments' memory in another way."""
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _bytes(leaf: Any) -> float:
    """What a kernel moves of a tensor: an expanded one is read once."""
    if not isinstance(leaf, torch.Tensor):
        return 0.0
    held = math.prod(size for size, stride in zip(leaf.shape, leaf.stride(), strict=True) if stride != 0)
    return float(held * leaf.element_size())


def _product(name: str, args: Any) -> tuple[int, int, int, int] | None:
    """(batch, m, n, k) of a matrix product."""
    if name in ("mm", "addmm"):
        left, right = args[-2:] if name == "mm" else args[1:3]
        return 1, left.shape[0], right.shape[1], left.shape[1]
    if name in ("bmm", "baddbmm"):
        left, right = args[-2:] if name == "bmm" else args[1:3]
        return left.shape[0], left.shape[1], right.shape[2], left.shape[2]
    return None


def _causal_products(count: float) -> Callable[..., float]:
    """FLOPs of `count` products of an attention whose queries see half of the keys: causal, and so is the mean over the
    parts of a sequence that is split over ranks in a balanced way. A window leaves a band of that; documents, which see
    less as well, are not counted off."""

    def flops(query: torch.Tensor, key: torch.Tensor, *others: Any) -> float:
        (batch, heads, queries, d), keys = query.shape, key.shape[2]
        window = next((other for other in others if isinstance(other, int)), keys)
        seen = window - window**2 / (2.0 * keys) if window < keys else keys / 2.0
        return count * 2.0 * batch * heads * queries * seen * d

    return flops


_ATTENTION: dict[str, Callable[..., float]] = {
    "ranged_attention": _causal_products(2),
    # Scores again, and four products of gradients (Dao et al., 2022).
    "ranged_attention_backward": lambda grad, *rest: _causal_products(5)(*rest),
}
