"""Proves a schedule complete and free of deadlock, without starting a process."""

from __future__ import annotations

import collections

from megatron.parallel.pipeline.schedule import (
    Action,
    Backward,
    BackwardInput,
    BackwardWeight,
    Channel,
    Forward,
    Schedule,
    incoming,
    label,
    next_to_ask,
    outgoing,
    passed_on,
)


def check_schedule(plan: Schedule, micro_batches: int, *, chunks: int = 1, backward: bool = True) -> None:
    """Assert that every stage runs everything once and in a possible order, that both ends of every channel have the
    same order of messages, and that nothing hangs however late messages are taken: a send ends only when its receiver
    takes the message, and a stage has one send under way in each channel.
    """
    for stage, actions in enumerate(plan):
        _check_complete(stage, actions, micro_batches, chunks, backward)
    _check_orders(plan, chunks)
    _check_progress(plan, chunks)


def _check_complete(stage: int, actions: list[Action], micro_batches: int, chunks: int, backward: bool) -> None:
    place = {action: at for at, action in enumerate(actions)}
    wanted: set[Action] = set()
    for number in range(micro_batches):
        for chunk in range(chunks):
            wanted.add(Forward(number, chunk))
            if not backward:
                continue
            split = BackwardInput(number, chunk) in place
            parts: list[Action] = [Backward(number, chunk)]
            if split:
                parts = [BackwardInput(number, chunk), BackwardWeight(number, chunk)]
            wanted.update(parts)
            order = [place.get(action, -1) for action in (Forward(number, chunk), *parts)]
            assert -1 in order or order == sorted(order), f"stage {stage}: {number} goes back before it went forward"
    missing, extra = sorted(map(label, wanted - set(place))), sorted(map(label, set(place) - wanted))
    assert not missing and not extra and len(place) == len(actions), (
        f"stage {stage} must run each action once: missing {missing}, unknown {extra}, {len(actions)} in all"
    )


def _check_orders(plan: Schedule, chunks: int) -> None:
    """One order of messages for each channel, alike on both sides."""
    sent: dict[Channel, list[Action]] = collections.defaultdict(list)
    taken: dict[Channel, list[Action]] = collections.defaultdict(list)
    for stage, actions in enumerate(plan):
        for action in actions:
            target, source = (find(action, stage, len(plan), chunks) for find in (outgoing, incoming))
            if target is not None:
                sent[target].append(passed_on(action, stage, len(plan)))
            if source is not None:
                taken[source].append(action)
    for channel in sent.keys() | taken.keys():
        assert sent[channel] == taken[channel], (
            f"stages {channel.sender} and {channel.receiver} send and receive in different orders: "
            f"{[label(action) for action in sent[channel]]} and {[label(action) for action in taken[channel]]}"
        )


def _check_progress(plan: Schedule, chunks: int) -> None:
    """Run the plan as the engine does, with rendezvous sends; assert that every stage comes to its end."""
    stages = [_Stage(number, actions, len(plan), chunks) for number, actions in enumerate(plan)]
    asked: set[tuple[Channel, Action]] = set()
    under_way: dict[Channel, Action] = {}
    delivered: set[tuple[Channel, Action]] = set()
    moved = True
    while moved:
        moved = False
        for stage in stages:
            while stage.step(asked, under_way, delivered):
                moved = True
            for channel, action in list(under_way.items()):
                if (channel, action) in asked:
                    del under_way[channel]
                    delivered.add((channel, action))
                    moved = True
    stuck = {stage.number: label(stage.actions[stage.at]) for stage in stages if stage.at < len(stage.actions)}
    assert not stuck and not under_way, f"deadlock: stages wait at {stuck}"


class _Stage:
    """Where one stage is in its list. Before an action works it asks for the message of the one that follows; it ends
    once its result has begun to be sent, which wants the channel free."""

    def __init__(self, number: int, actions: list[Action], stages: int, chunks: int) -> None:
        self.number, self.actions, self.stages, self.chunks = number, actions, stages, chunks
        self.at, self.worked = 0, False

    def step(
        self,
        asked: set[tuple[Channel, Action]],
        under_way: dict[Channel, Action],
        delivered: set[tuple[Channel, Action]],
    ) -> bool:
        """Go on as far as the next message allows; False where it does not."""
        if self.at == len(self.actions):
            return False
        action = self.actions[self.at]
        if not self.worked:
            source = incoming(action, self.number, self.stages, self.chunks)
            if source is not None:
                asked.add((source, action))
                if (source, action) not in delivered:
                    return False
            self._ask_ahead(asked)
            self.worked = True
        target = outgoing(action, self.number, self.stages, self.chunks)
        if target in under_way:
            return False
        if target is not None:
            under_way[target] = passed_on(action, self.number, self.stages)
        self.at, self.worked = self.at + 1, False
        return True

    def _ask_ahead(self, asked: set[tuple[Channel, Action]]) -> None:
        following = next_to_ask(self.actions, self.at)
        if following is not None:
            source = incoming(following, self.number, self.stages, self.chunks)
            if source is not None:
                asked.add((source, following))
