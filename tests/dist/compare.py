"""Puts the ranks' regions together and measures how far they are from the one-rank model."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np

from megatron.parallel.layout import Region
from tests.dist.case import Result

TOLERANCE = 1e-11


def assemble(regions: Iterable[tuple[Region, np.ndarray]]) -> dict[str, np.ndarray]:
    """Whole tensors from regions of all ranks; copies of an element must be equal, and none may be missing."""
    whole: dict[str, np.ndarray] = {}
    for region, values in regions:
        tensor = whole.setdefault(region.name, np.full(region.shape, np.nan))
        place = tensor[region.slices]
        seen = ~np.isnan(place)
        assert np.array_equal(place[seen], values[seen]), f"copies of {region.name} differ between ranks"
        place[...] = values
    for name, tensor in whole.items():
        assert not np.isnan(tensor).any(), f"{name} is not finite, or no rank holds parts of it"
    return whole


def deviation(results: Sequence[Result], reference: Result) -> float:
    """The largest relative deviation in any loss, norm, gradient or weight; each tensor is measured by its largest
    element. Asserts what must hold exactly: all ranks agree, padding is zero, communication was orderly."""
    largest = 0.0
    for result in results:
        assert result.losses == results[0].losses and result.norms == results[0].norms, "ranks report different figures"
        assert result.padding == 0.0, "padding rows were trained"
        assert result.open_works == 0, f"{result.open_works} operations were never waited for"
    check_orders(results)
    for ours, theirs in zip(results[0].losses + results[0].norms, reference.losses + reference.norms, strict=True):
        assert np.isfinite(ours)
        largest = max(largest, abs(ours - theirs) / abs(theirs))
    for what in ("gradients", "weights"):
        ours_all = assemble(pair for result in results for pair in getattr(result, what))
        theirs_all = assemble(getattr(reference, what))
        assert ours_all.keys() == theirs_all.keys()
        for name, theirs_tensor in theirs_all.items():
            assert np.abs(theirs_tensor).max() > 0, f"{what} of {name} are all zero: the case proves nothing"
            difference = np.abs(ours_all[name] - theirs_tensor).max() / np.abs(theirs_tensor).max()
            largest = max(largest, float(difference))
    return largest


def check_orders(results: Sequence[Result]) -> None:
    """Assert that all members of a communicator issued the same operations in the same order."""
    orders: dict[str, list[str]] = {}
    for result in results:
        for name, issued in result.log.items():
            assert orders.setdefault(name, issued) == issued, f"members of {name} issued different operations"
