"""Watches a program run on tensors without storage: each operation, each allocation, each message, in their order.

The program runs on torch's meta device, where tensors have shapes and types only. A dispatch mode sees every
operation below autograd, so nothing has to be counted by formula but the FLOPs of single operations. Phases are the
program's own profiler ranges (`torch.autograd.profiler.record_function`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from megatron.plan.operations import Operation, describe

# CUDA's caching allocator hands out multiples of this many bytes.
ALLOCATION_UNIT_BYTES = 512


@dataclass(frozen=True)
class Message:
    """One collective or point-to-point operation: what each rank puts in, over which ranks, from where in the program.

    `kind` is the communicator's method; `payload_bytes` is the size of the larger of input and output; `peer` is the
    other end of a send or receive, as an index into `ranks`.
    """

    kind: str
    axis: str
    ranks: tuple[int, ...]
    payload_bytes: int
    peer: int | None = None


@dataclass(frozen=True)
class Start:
    """A message is handed to its communicator."""

    message: Message


@dataclass(frozen=True)
class Wait:
    """The program waits for the message that the event with this index started."""

    started: int


Event = Operation | Start | Wait


@dataclass
class Phase:
    """A named stretch of the program, as a range of events; `stop` is None while it is open."""

    name: str
    start: int
    stop: int | None = None

    @property
    def end(self) -> int:
        """The first event after it."""
        assert self.stop is not None, f"{self.name} is still open"
        return self.stop


@dataclass
class Allocation:
    """A storage of `size` bytes: between which events it lived (`death` None: to the end), in which phase it was made
    (None: in none), and what the program keeps there, where that is known."""

    size: int
    birth: int
    phase: Phase | None
    death: int | None = None
    label: str = ""


@dataclass
class Recording:
    """All that was seen, in order."""

    events: list[Event] = field(default_factory=list)
    phases: list[Phase] = field(default_factory=list)
    allocations: list[Allocation] = field(default_factory=list)


class Recorder(TorchDispatchMode):
    """Within it, every operation, storage and phase is written to `recording`."""

    def __init__(self) -> None:
        super().__init__()
        self.recording = Recording()
        self._open: list[Phase] = []
        self._known: dict[int, Allocation] = {}
        self._labels: dict[int, str] = {}  # of every storage that is watched, also while it is empty

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "profiler":
            self._phase(func, args)
            return result
        operation = describe(func, args, kwargs or {}, result)
        if operation is not None:
            self.recording.events.append(operation)
        for leaf in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(leaf, torch.Tensor):
                self._allocate(leaf.untyped_storage())
        return result

    @contextmanager
    def watching(self) -> Iterator[Recording]:
        """Record what happens inside, changes of a storage's size included."""
        resize = torch.UntypedStorage.resize_

        def resize_and_note(storage: torch.UntypedStorage, size: int) -> Any:
            self._free(storage._cdata)
            result = resize(storage, size)
            self._allocate(storage)
            return result

        with patch.object(torch.UntypedStorage, "resize_", resize_and_note), self:
            yield self.recording

    def label(self, tensor: torch.Tensor, label: str) -> None:
        """Say what the program keeps in a tensor's storage."""
        storage = tensor.untyped_storage()
        self._allocate(storage)
        self._labels[storage._cdata] = label
        if storage._cdata in self._known:
            self._known[storage._cdata].label = label

    def message(self, message: Message) -> int:
        """Note that a message was started; returns the event's index."""
        self.recording.events.append(Start(message))
        return len(self.recording.events) - 1

    def wait(self, started: int) -> None:
        """Note that the program waits for a message."""
        self.recording.events.append(Wait(started))

    def _phase(self, func: Any, args: Any) -> None:
        if "enter" in func._schema.name:
            self._open.append(Phase(args[0], len(self.recording.events)))
            self.recording.phases.append(self._open[-1])
        else:
            self._open.pop().stop = len(self.recording.events)

    def _allocate(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self._labels:
            self._labels[key] = ""
            weakref.finalize(storage, self._gone, key)
        if key in self._known or storage.nbytes() == 0:
            return
        size = -(-storage.nbytes() // ALLOCATION_UNIT_BYTES) * ALLOCATION_UNIT_BYTES
        phase = self._open[-1] if self._open else None
        self._known[key] = Allocation(size, len(self.recording.events), phase, label=self._labels[key])
        self.recording.allocations.append(self._known[key])

    def _free(self, key: int) -> None:
        allocation = self._known.pop(key, None)
        if allocation is not None:
            allocation.death = len(self.recording.events)

    def _gone(self, key: int) -> None:
        self._free(key)
        del self._labels[key]
