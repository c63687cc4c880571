"""The tokens around messages, which some metrics leave out."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron.data.instruction.template import END, START
from megatron.data.provenance import read_provenance
from megatron.evaluate.metrics import METRICS, Markers
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError


def find_markers(metrics: Sequence[str], prefixes: Sequence[str], tokenizer: Path | None) -> Markers | None:
    """The tokens around messages, for the metrics that leave them out; None where none of these is asked for.

    `prefixes` are the pairs of tokens that are evaluated. Raises ConfigError where the tokenizer, with the tokens that
    were added to it for them, does not have the markers.
    """
    asked = [name for name in metrics if METRICS[name].needs_markers]
    if not asked:
        return None
    which = f"evaluate.metrics has {asked[0]}, which leaves out the tokens {START} and {END} and what is behind them"
    if tokenizer is None:
        raise ConfigError(f"{which}; but no tokenizer is known: name it in tokenizer.path, or leave {asked[0]} out")
    added: list[str] = []
    for prefix in prefixes:
        provenance = read_provenance(prefix)
        added = added if provenance is None else provenance.added_tokens
    known = load_tokenizer(tokenizer, added)
    start, end = known.token_id(START), known.token_id(END)
    if start is None or end is None:
        raise ConfigError(
            f"{which}; but {tokenizer} does not have them, nor were they added for the data: leave "
            f"{', '.join(asked)} out, or use data written with Megatron-LLM's template"
        )
    return Markers(start, end)
