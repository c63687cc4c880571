"""Doing something on every rank such that no rank waits for one that has failed."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import TypeVar

from megatron.utils import errors
from megatron.utils.errors import MegatronError

T = TypeVar("T")
Exchange = Callable[[str], list[str]]  # gathers a text from every rank, in rank order


def agree(exchange: Exchange, action: Callable[[], T]) -> T:
    """Run `action` on every rank; if it failed on any, raise on all of them, see `raise_together`."""
    failure: Exception | None = None
    result: T | None = None
    try:
        result = action()
    except Exception as error:  # whatever it is, the others must hear of it
        failure = error
    raise_together(exchange, failure)
    return result  # type: ignore[return-value]


def raise_together(exchange: Exchange, failure: Exception | None) -> None:
    """Return if no rank has a `failure`; else raise, on all ranks, that of the lowest rank with one.

    A rank whose failure is a bug (not a `MegatronError`) raises it, with its traceback; the others say who failed.
    """
    expected = failure is None or isinstance(failure, MegatronError)
    own = "" if failure is None else json.dumps([type(failure).__name__ if expected else "", str(failure)])
    reports = exchange(own)
    if failure is not None and not expected:
        raise failure
    rank = next((rank for rank, report in enumerate(reports) if report), None)
    if rank is None:
        return
    kind, message = json.loads(reports[rank])
    agreed = getattr(errors, kind, MegatronError)(message) if kind else MegatronError(f"rank {rank} failed: {message}")
    agreed.met_by = "world"
    raise agreed from failure
