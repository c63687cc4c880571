"""How a sequence is split over the ranks of the context."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron.kernels.runs import Documents
from megatron.parallel import context as module
from megatron.parallel.context import causal_runs, held_before, local_part, local_positions, runs_into
from megatron.parallel.mesh import Axis, Grid, describe

CPU = torch.device("cpu")


def ranks(size: int) -> list[Axis]:
    return [Axis("cp", rank, size) for rank in range(size)]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_the_parts_are_the_sequence(size: int) -> None:
    whole = torch.arange(2 * 12 * size).view(2, -1)
    parts = [local_part(whole, cp) for cp in ranks(size)]
    assert all(part.shape == (2, 12) for part in parts)
    assert torch.equal(torch.cat(parts, dim=1).sort(dim=1).values, whole)
    for part, cp in zip(parts, ranks(size), strict=True):
        assert torch.equal(part[0], local_positions(12, cp, CPU))
        assert (part.diff(dim=1) > 0).all(), "a rank's tokens are not in the order of the sequence"


@pytest.mark.parametrize("size", [2, 3, 4])
def test_all_ranks_have_as_much_to_do(size: int) -> None:
    work = [int((local_positions(8, cp, CPU) + 1).sum()) for cp in ranks(size)]
    assert len(set(work)) == 1


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_run_of_the_sequence_is_one_of_each_ranks_keys(size: int) -> None:
    length, half = 6 * size, 3
    for cp in ranks(size):
        held = local_positions(6, cp, CPU)
        for position in range(length + 1):
            expected = int((held < position).sum())
            assert held_before(torch.tensor(position), cp.rank, cp, half).item() == expected


@pytest.mark.parametrize("size", [2, 3, 4])
def test_every_pair_of_query_and_key_is_met_once(size: int) -> None:
    length = 8 * size
    starts = torch.tensor([0, 3, 3, 3, 7, 8] + [8] * (length - 14) + [length - 8] * 8)
    starts = torch.where(starts <= torch.arange(length), starts, 0).cummax(dim=0).values.to(torch.int32)[None]
    met = torch.zeros(length, length, dtype=torch.int64)
    for cp in ranks(size):
        mine = local_positions(8, cp, CPU)
        runs = causal_runs(1, 8, Documents(local_part(starts, cp), 8), cp, CPU)
        for owner in ranks(size):
            queries, into = runs_into(owner.rank, runs, cp)
            theirs = local_positions(8, owner, CPU)
            for query, start, stop in zip(mine[queries], into.start[0], into.stop[0], strict=True):
                met[query, theirs[start:stop]] += 1
    place = torch.arange(length)
    assert torch.equal(met, ((place >= starts.t()) & (place <= place[:, None])).long())


class Noting:
    """A communicator that sends nothing: it notes when an operation starts and when somebody waits for it."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def send(self, tensor: torch.Tensor, peer: int) -> Noted:
        self.notes.append("send")
        return Noted(self.notes, "sent")

    def receive(self, tensor: torch.Tensor, peer: int) -> Noted:
        self.notes.append("receive")
        tensor.zero_()
        return Noted(self.notes, "received")


class Noted:
    def __init__(self, notes: list[str], what: str) -> None:
        self.notes, self.what = notes, what

    def wait(self) -> None:
        self.notes.append(self.what)


def test_blocks_travel_behind_the_computation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three ranks: the next block is asked for before attention to the present one, and waited for behind it."""
    notes: list[str] = []
    context = describe(Grid(context=3), 1)
    axes = {name: replace(context.axis(name), communicator=Noting(notes)) for name in ("ring_even", "ring_odd")}
    for name in ("run_attention", "run_attention_backward"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *words, call=original: (notes.append("attend"), call(*words))[1])
    query, key, value = (torch.randn(1, 1, 4, 2).requires_grad_() for _ in range(3))
    runs = causal_runs(1, 4, None, context.cp, CPU)
    mixed = module.context_attention(query, key, value, runs, replace(context, **axes))
    passing, arrived = ["send", "receive"], ["received", "sent"]
    assert notes == [*passing, "attend", *arrived, *passing, "attend", *arrived, "attend"]
    notes.clear()
    mixed.sum().backward()
    # Gradients of a block follow it, a step behind, behind the computation on the next one; the last go home.
    middle = [*passing, "attend", *arrived]
    assert notes == [*passing, "attend", *arrived, *middle, *passing, "attend", *arrived, *passing, *arrived]
