"""How a configuration key is declared: a default, one sentence for the reference, and its limits.

The limits are data, so that loading can check every key alike and the generated reference can print them. Standard
library only, like every dataclass of the configuration.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class KeyInfo:
    """What is known of a key beside its type: `doc` for people, and limits for its numbers (None: no such limit)."""

    doc: str
    minimum: float | None = None
    above: float | None = None
    maximum: float | None = None
    below: float | None = None


def key(
    default: Any,
    doc: str,
    *,
    minimum: float | None = None,
    above: float | None = None,
    maximum: float | None = None,
    below: float | None = None,
) -> Any:
    """A dataclass field that carries its documentation and limits (`minimum` ≤ value, `above` < value, …)."""
    info = KeyInfo(doc, minimum, above, maximum, below)
    return dataclasses.field(default=default, metadata={"key": info})


def key_info(field: dataclasses.Field[Any]) -> KeyInfo:
    """The `KeyInfo` of a field that was declared with `key`."""
    info = field.metadata["key"]
    assert isinstance(info, KeyInfo), field
    return info
