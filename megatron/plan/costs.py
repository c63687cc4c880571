"""How long operations and messages take on given hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from megatron.plan.hardware import Gpu, Interconnect
from megatron.plan.operations import Operation
from megatron.plan.recorder import Message

# Output tiles of the products of large matrices, as the vendor's library cuts them.
_TILE_ROWS, _TILE_COLUMNS = 128, 256

# Of `payload_bytes`, what each of n ranks sends and receives in a ring (Patarasuk and Yuan, 2009).
RING_SHARES = {"all_reduce": 2.0, "all_gather": 1.0, "reduce_scatter": 1.0}


def ring_bytes(message: Message) -> float:
    """Bytes that each rank sends for this message."""
    n = len(message.ranks)
    if message.kind in RING_SHARES:
        return RING_SHARES[message.kind] * message.payload_bytes * (n - 1) / n
    return float(message.payload_bytes) if message.kind == "send" else 0.0


@dataclass(frozen=True)
class Costs:
    """Durations on one kind of machine, for products at one `train.precision`."""

    gpu: Gpu
    interconnect: Interconnect
    precision: str

    def operation_s(self, operation: Operation) -> float:
        """Seconds of one operation: what its FLOPs or its bytes need, whichever is more, and its launch."""
        gpu = self.gpu
        peak = gpu.peak_flops_per_s(self.precision)
        moving = operation.bytes / (gpu.memory_bytes_per_s * gpu.memory_efficiency)
        computing = 0.0
        if operation.attention:
            computing = operation.flops / (peak * gpu.attention_efficiency)
        elif operation.flops > 0:
            computing = operation.flops / (peak * gpu.product_efficiency * self._filling(operation.product))
        return max(moving, computing) + gpu.launch_s

    def message_s(self, message: Message) -> float:
        """Seconds of one message while all ranks of the machine send theirs."""
        wires, n = self.interconnect, len(message.ranks)
        nodes = self._nodes(message)
        share, payload = RING_SHARES[message.kind], message.payload_bytes
        within = share * payload * (n - 1) / n / (wires.link_bytes_per_s * wires.link_efficiency)
        steps = math.ceil(math.log2(n)) * share
        if nodes == 1:
            return within + steps * wires.link_latency_s
        # What enters a node passes its adapters once, and the groups of a node's other GPUs want their part of them.
        lanes = wires.network_bytes_per_s * wires.network_efficiency * (n / nodes) / wires.gpus_per_node
        across = share * payload * (nodes - 1) / nodes / lanes
        return max(within if n > nodes else 0.0, across) + steps * wires.network_latency_s

    def transfer_s(self, payload_bytes: int, sender: int, receiver: int) -> float:
        """Seconds of a message from one rank to another while all ranks of their nodes send theirs."""
        wires = self.interconnect
        if sender // wires.gpus_per_node == receiver // wires.gpus_per_node:
            return payload_bytes / (wires.link_bytes_per_s * wires.link_efficiency) + wires.link_latency_s
        lane = wires.network_bytes_per_s * wires.network_efficiency / wires.gpus_per_node
        return payload_bytes / lane + wires.network_latency_s

    def link(self, message: Message) -> str:
        """Over what a message goes: `link` within a node, else `network`."""
        return "link" if self._nodes(message) == 1 else "network"

    def _nodes(self, message: Message) -> int:
        return len({rank // self.interconnect.gpus_per_node for rank in message.ranks})

    def _filling(self, product: tuple[int, int, int, int] | None) -> float:
        """Which share of its best rate a product reaches, by its shape."""
        if product is None:
            return 1.0
        batch, m, n, k = product
        tiles = batch * math.ceil(m / _TILE_ROWS) * math.ceil(n / _TILE_COLUMNS)
        waves = math.ceil(tiles / self.gpu.multiprocessors)
        return tiles / (waves * self.gpu.multiprocessors) * k / (k + self.gpu.product_half_depth)
