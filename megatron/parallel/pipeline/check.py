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
    same order of messages, and that nothing hangs: a send ends only when its receiver takes the message, a stage has
    one send under way in each channel, and each communicator runs its messages in the order of issue (as NCCL's do).
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
    """Run the plan as the engine does, over communicators without buffers; assert that every stage comes to its end."""
    mail = _Mail()
    stages = [_Stage(number, actions, len(plan), chunks, mail) for number, actions in enumerate(plan)]
    moved = True
    while moved:
        moved = False
        for stage in stages:
            while stage.step():
                moved = True
        moved = mail.move() or moved
    stuck = {stage.number: label(stage.actions[stage.at]) for stage in stages if stage.at < len(stage.actions)}
    assert not stuck and not mail.under_way(), f"deadlock: stages wait at {stuck}"


class _Mail:
    """The communicators of all stages, as unkind as may be: each runs a stage's sends and receives one after the other
    in the order of issue, and both ends of a message begin it together."""

    def __init__(self) -> None:
        self._queues: dict[tuple[int, bool, bool], collections.deque[tuple[Channel, Action]]] = {}
        self._ended: set[tuple[Channel, Action]] = set()

    def post(self, stage: int, channel: Channel, action: Action) -> None:
        """Issue one end of the message that `action` of the receiving stage needs."""
        end = (stage, channel.forward, channel.wraps)
        self._queues.setdefault(end, collections.deque()).append((channel, action))

    def ended(self, channel: Channel, action: Action) -> bool:
        """Whether this message was handed over."""
        return (channel, action) in self._ended

    def under_way(self) -> bool:
        """Whether some message was issued at one end and never handed over."""
        return any(self._queues.values())

    def move(self) -> bool:
        """Hand over every message that both ends have come to; False where there is none."""
        moved = False
        for (stage, *communicator), queue in self._queues.items():
            while queue:
                channel, action = queue[0]
                if stage != channel.receiver:
                    break  # looked at from the other end
                other = self._queues.get((channel.sender, communicator[0], communicator[1]))
                if not other or other[0] != (channel, action):
                    break
                queue.popleft(), other.popleft()
                self._ended.add((channel, action))
                moved = True
        return moved


class _Stage:
    """Where one stage is in its list. Before an action works it asks for the message of the one that follows; it ends
    once its result has begun to be sent, after the send before it in that channel."""

    def __init__(self, number: int, actions: list[Action], stages: int, chunks: int, mail: _Mail) -> None:
        self.number, self.actions, self.stages, self.chunks, self.mail = number, actions, stages, chunks, mail
        self.at, self.worked = 0, False
        self._asked: set[Action] = set()
        self._sending: dict[Channel, Action] = {}

    def step(self) -> bool:
        """Go on by one action, as far as messages allow; False where they do not."""
        if self.at == len(self.actions):
            return False
        action = self.actions[self.at]
        if not self.worked:
            source = self._ask(action)
            if source is not None and not self.mail.ended(source, action):
                return False
            following = next_to_ask(self.actions, self.at)
            if following is not None:
                self._ask(following)
            self.worked = True
        target = outgoing(action, self.number, self.stages, self.chunks)
        if target is not None:
            if target in self._sending and not self.mail.ended(target, self._sending[target]):
                return False
            self._sending[target] = passed_on(action, self.number, self.stages)
            self.mail.post(self.number, target, self._sending[target])
        self.at, self.worked = self.at + 1, False
        return True

    def _ask(self, action: Action) -> Channel | None:
        """Issue the receive of an action's message, once; the channel it comes by."""
        source = incoming(action, self.number, self.stages, self.chunks)
        if source is not None and action not in self._asked:
            self._asked.add(action)
            self.mail.post(self.number, source, action)
        return source
