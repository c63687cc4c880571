"""Compares what the ranks of a group hand to its communicator: where they differ, a cluster would hang or go wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron.plan.rank import RankRecord

# Axes whose groups run over several stages; a group of another axis lies within one.
_ACROSS_STAGES = ("model", "loss", "embed", "world")

Step = tuple[str, int]


def mismatches(records: Mapping[int, Sequence[RankRecord]], like: Sequence[int]) -> Iterator[str]:
    """What does not match, in words: nothing where all is well.

    `records` has the recorded ranks of each kind of stage, `like` the kind of every stage.
    """
    for stage, ranks in records.items():
        for other in ranks[1:]:
            yield from _compare(f"tensor ranks of stage {stage}", _collectives(ranks[0]), _collectives(other))
    kinds = list(records)
    for stage in kinds[1:]:
        first, other = records[kinds[0]][0], records[stage][0]
        yield from _compare(
            f"stages {kinds[0]} and {stage}",
            {axis: steps for axis, steps in _collectives(first).items() if axis in _shared(first, other)},
            {axis: steps for axis, steps in _collectives(other).items() if axis in _shared(first, other)},
        )
    for stage in range(len(like) - 1):
        yield from _compare_neighbours(stage, records[like[stage]][0], records[like[stage + 1]][0])


def _shared(first: RankRecord, other: RankRecord) -> set[str]:
    """The axes over which both ranks are in one group."""
    return {
        name
        for name in _ACROSS_STAGES
        if first.context.axis(name).ranks == other.context.axis(name).ranks and first.context.axis(name).size > 1
    }


def _collectives(record: RankRecord) -> dict[str, list[Step]]:
    """Kinds and sizes of the collectives of a rank, in order, by axis."""
    steps: dict[str, list[Step]] = {}
    for message in record.messages(record.second_step):
        if message.peer is None:
            steps.setdefault(message.axis, []).append((message.kind, message.payload_bytes))
    return steps


def _compare(who: str, first: Mapping[str, list[Step]], second: Mapping[str, list[Step]]) -> Iterator[str]:
    for axis in sorted(first.keys() | second.keys()):
        ours, theirs = first.get(axis, []), second.get(axis, [])
        if ours != theirs:
            at = next((n for n, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
            at = min(len(ours), len(theirs)) if at is None else at
            yield f"{who} differ on axis {axis} from message {at} on: {_words(ours, at)} and {_words(theirs, at)}"


def _compare_neighbours(stage: int, upper: RankRecord, lower: RankRecord) -> Iterator[str]:
    """What a stage sends down is what the next one receives, and the other way round for gradients."""
    for axis, sender, receiver in (("forward", upper, lower), ("backward", lower, upper)):
        sent = [m.payload_bytes for m in sender.messages(sender.second_step) if (m.axis, m.kind) == (axis, "send")]
        got = [
            m.payload_bytes for m in receiver.messages(receiver.second_step) if (m.axis, m.kind) == (axis, "receive")
        ]
        if sent != got:
            yield (
                f"stages {stage} and {stage + 1}: {len(sent)} messages of {sum(sent)} bytes are sent {axis}, "
                f"{len(got)} of {sum(got)} bytes expected"
            )


def _words(steps: Sequence[Step], at: int) -> str:
    return f"{steps[at][0]} of {steps[at][1]} bytes" if at < len(steps) else "nothing"
