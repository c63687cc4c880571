"""Compares what the ranks of a group hand to its communicator: where they differ, a cluster would hang or go wrong."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from megatron.plan.rank import RankRecord

Step = tuple[str, int]


def mismatches(records: Mapping[int, Sequence[RankRecord]], like: Sequence[int]) -> Iterator[str]:
    """What does not match, in words: nothing where all is well.

    `records` has the recorded ranks of each kind of stage, `like` the kind of every stage.
    """
    for stage, ranks in records.items():
        for other in ranks[1:]:
            yield from _compare(f"tensor ranks of stage {stage}", ranks[0], other)
    kinds = list(records)
    for stage in kinds[1:]:
        yield from _compare(f"stages {kinds[0]} and {stage}", records[kinds[0]][0], records[stage][0])
    for stage in range(len(like) - 1):
        yield from _compare_neighbours(stage, records[like[stage]][0], records[like[stage + 1]][0])


def _collectives(record: RankRecord) -> dict[str, list[Step]]:
    """Kinds and sizes of the collectives of a rank, in order, by axis."""
    steps: dict[str, list[Step]] = {}
    for message in record.messages(record.second_step):
        if message.peer is None:
            steps.setdefault(message.axis, []).append((message.kind, message.payload_bytes))
    return steps


def _compare(who: str, first: RankRecord, second: RankRecord) -> Iterator[str]:
    """Two ranks, on the axes of which they are in one group."""
    ours, theirs = _collectives(first), _collectives(second)
    for axis in first.context.axes():
        if axis.size == 1 or axis.ranks != second.context.axis(axis.name).ranks:
            continue
        one, two = ours.get(axis.name, []), theirs.get(axis.name, [])
        if one != two:
            pairs = enumerate(zip(one, two, strict=False))
            at = next((number for number, (left, right) in pairs if left != right), min(len(one), len(two)))
            yield f"{who} differ on axis {axis.name} from message {at} on: {_words(one, at)} and {_words(two, at)}"


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
