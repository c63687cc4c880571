"""How an operation is made known to torch: schema, shapes for fake tensors, and which code runs it.

An operation runs its compiled kernel where there is one for the tensors, else its reference. torch sees the same
operation in both cases: under `torch.compile`, on fake tensors, and in a profile.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

NAMESPACE = "megatron"
_LIBRARY = torch.library.Library(NAMESPACE, "DEF")


def define(
    schema: str,
    *,
    reference: Callable[..., Any],
    native: Callable[..., Any],
    fake: Callable[..., Any],
) -> Callable[..., Any]:
    """Define `megatron::<name>` and return it.

    `native` returns None where it has no kernel for its arguments, and True where it worked in place.
    """
    name = schema.partition("(")[0]
    _LIBRARY.define(schema)

    def run(*arguments: Any) -> Any:
        result = native(*arguments)
        if result is None:
            return reference(*arguments)
        return None if result is True else result

    _LIBRARY.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.megatron, name).default


def define_backward(name: str, backward: Callable[..., Any], setup_context: Callable[..., None]) -> None:
    """Give an operation its derivative, as `torch.library.register_autograd` takes it."""
    torch.library.register_autograd(f"{NAMESPACE}::{name}", backward, setup_context=setup_context, lib=_LIBRARY)
