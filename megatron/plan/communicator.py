"""A communicator that sends nothing: it writes down what a rank would have sent, and to whom."""

from __future__ import annotations

import torch

from megatron.plan.recorder import Message, Recorder


class _Recorded:
    """The `Work` of a recorded message."""

    def __init__(self, recorder: Recorder, started: int) -> None:
        self._recorder, self._started = recorder, started

    def wait(self) -> None:
        self._recorder.wait(self._started)


class RecordingCommunicator:
    """A `Communicator` (megatron.parallel.communicator) of one group of ranks."""

    def __init__(self, recorder: Recorder, ranks: tuple[int, ...]) -> None:
        self._recorder, self._ranks = recorder, ranks
        self.axis = ""

    def all_reduce(self, tensor: torch.Tensor, maximum: bool = False) -> _Recorded:
        """Sum over the group."""
        return self._start("all_reduce", tensor)

    def all_gather(self, output: torch.Tensor, tensor: torch.Tensor) -> _Recorded:
        """Concatenate the members' shares."""
        return self._start("all_gather", output)

    def reduce_scatter(self, output: torch.Tensor, tensor: torch.Tensor) -> _Recorded:
        """Sum over the group, of which each member keeps a share."""
        return self._start("reduce_scatter", tensor)

    def send(self, tensor: torch.Tensor, peer: int) -> _Recorded:
        """To one member."""
        return self._start("send", tensor, peer)

    def receive(self, tensor: torch.Tensor, peer: int) -> _Recorded:
        """From one member."""
        return self._start("receive", tensor, peer)

    def _start(self, kind: str, tensor: torch.Tensor, peer: int | None = None) -> _Recorded:
        payload = tensor.numel() * tensor.element_size()
        message = Message(kind, self.axis, self._ranks, payload, peer)
        return _Recorded(self._recorder, self._recorder.message(message))
