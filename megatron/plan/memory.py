"""What fills a rank's memory when it is fullest, from the lifetimes of its storages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from megatron.plan.recorder import Allocation, Recording

# Labels that the planner gives to what lives as long as the step does.
WEIGHTS, GRADIENTS, OPTIMIZER = "weights", "gradients", "optimizer"
# What a forward pass leaves for the backward pass, and what lives only within one action.
ACTIVATIONS, WORKSPACE = "activations", "workspace"
CATEGORIES = (WEIGHTS, GRADIENTS, OPTIMIZER, ACTIVATIONS, WORKSPACE)


@dataclass(frozen=True)
class Peak:
    """Bytes of each category at the fullest moment, the event at which that was, and the phase it was in."""

    bytes: Mapping[str, int]
    event: int
    phase: str

    @property
    def total(self) -> int:
        return sum(self.bytes.values())


def peak_memory(recording: Recording, start: int = 0) -> Peak:
    """The fullest moment from event `start` on."""
    allocations = recording.allocations
    births = np.array([allocation.birth for allocation in allocations])
    never = len(recording.events) + 1
    deaths = np.array([never if allocation.death is None else allocation.death for allocation in allocations])
    sizes = np.array([allocation.size for allocation in allocations], dtype=np.int64)
    change = np.zeros(never + 1, dtype=np.int64)
    np.add.at(change, births, sizes)
    np.add.at(change, deaths, -sizes)
    held = np.cumsum(change[:never])
    event = start + int(held[start:].argmax())
    amounts = dict.fromkeys(CATEGORIES, 0)
    for index in np.flatnonzero((births <= event) & (deaths > event)):
        amounts[_category(allocations[index])] += int(sizes[index])
    inside = [phase for phase in recording.phases if phase.start <= event < (phase.stop or never)]
    return Peak(amounts, event, inside[-1].name if inside else "")


def _category(allocation: Allocation) -> str:
    """A label where it has one; an activation outlives the forward action that made it; the rest is workspace."""
    phase = allocation.phase
    if allocation.label or phase is None or phase.stop is None or not phase.name.startswith("F"):
        return allocation.label or WORKSPACE
    return ACTIVATIONS if allocation.death is None or allocation.death > phase.stop else WORKSPACE
