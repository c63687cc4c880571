"""Several contestants side by side: all are started, then take turns, so that what else the machine does hits all."""

from __future__ import annotations

import importlib.util
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from harness.contestants import Contestant, Job, Workload
from harness.fleet import ContestantFailed, Fleet

_LONG_STEP_S = 4.0  # steps that last longer are warmed up once, not twice
_TURN_S = 1.0  # a turn has as many steps as fit, at least one
_PRODUCTS_S = 1.0
_PREPARATION = 0.7  # of the time may go to starting and warming up; who is not ready then is out

Say = Callable[[str], None]


@dataclass
class Result:
    """What was seen of one contestant: seconds of each counted step, bytes of memory summed over its processes."""

    contestant: Contestant
    tokens: int
    seconds: list[float] = field(default_factory=list)
    memory: dict[str, int] | None = None
    failure: str | None = None

    @property
    def best(self) -> float:
        """Tokens per second of the fastest step."""
        return self.tokens / min(self.seconds)

    @property
    def median(self) -> float:
        """Tokens per second of the median step."""
        return self.tokens / statistics.median(self.seconds)


@dataclass
class Race:
    """Results of contestants that took turns, and the FLOP/s of matrix products with the same threads, measured among
    the turns; by number of processes, since that number divides the threads.
    """

    precision: str
    processes: int
    results: list[Result]
    products: dict[int, float] = field(default_factory=dict)
    rounds: int = 0


class Lane:
    """A contestant with its processes."""

    def __init__(self, contestant: Contestant, workload: Workload, precision: str, threads: int) -> None:
        self.result = Result(contestant, workload.tokens(contestant))
        self._job = Job(contestant, workload.of(contestant), precision)
        self._threads = max(1, threads // contestant.world)
        self._fleet: Fleet | None = None
        self.steps = 1

    @property
    def runs(self) -> bool:
        return self.result.failure is None

    def launch(self) -> None:
        """Start the processes, which import what they need meanwhile."""
        missing = [name for name in self.result.contestant.packages if importlib.util.find_spec(name) is None]
        if missing:
            self.result.failure = f"{', '.join(missing)} is not installed"
        else:
            self._fleet = Fleet(self._job, self.result.contestant.world, self._threads)

    def warm_up(self, deadline: float) -> None:
        """Build the model and run the first steps, which are not counted."""
        self._guard(lambda fleet: fleet.ask({"do": "build"}, deadline))
        last = self._run(1, deadline)
        if last and last[0] <= _LONG_STEP_S:
            last = self._run(1, deadline)
        if last:
            self.steps = max(1, round(_TURN_S / last[0]))

    def wait(self, deadline: float) -> None:
        """Until the processes have imported what they need."""
        self._guard(lambda fleet: fleet.answers(deadline))

    def turn(self, deadline: float) -> None:
        """Run some steps that count."""
        self.result.seconds += self._run(self.steps, deadline)

    def read_memory(self, deadline: float) -> None:
        answers = self._guard(lambda fleet: fleet.ask({"do": "memory"}, deadline))
        if answers and all(answer["memory"] is not None for answer in answers):
            keys = answers[0]["memory"]
            self.result.memory = {key: sum(answer["memory"][key] for answer in answers) for key in keys}

    def close(self) -> None:
        if self._fleet is not None:
            self._fleet.close()
        self._fleet = None

    def _run(self, steps: int, deadline: float) -> list[float]:
        """Seconds of each step: of the slowest process, since a step ends when all have ended it."""
        answers = self._guard(lambda fleet: fleet.ask({"do": "run", "steps": steps}, deadline))
        return [max(times) for times in zip(*(answer["seconds"] for answer in answers), strict=True)]

    def _guard(self, action: Callable[[Fleet], list[dict[str, Any]]]) -> list[dict[str, Any]]:
        """The answers; none where this contestant has failed, now or before."""
        if self.result.failure is None and self._fleet is not None:
            try:
                return action(self._fleet)
            except ContestantFailed as failure:
                self.result.failure = str(failure)
                self.close()
        return []


class Products:
    """Processes that measure what matrix products reach with the threads of one contestant."""

    def __init__(self, workload: Workload, precision: str, world: int, threads: int) -> None:
        self.world = world
        self.best = 0.0
        self._fleet = Fleet(Job(None, workload, precision), world, max(1, threads // world))
        self._fleet.answers(time.monotonic() + 120.0)

    def turn(self, deadline: float) -> None:
        answers = self._fleet.ask({"do": "products", "budget_s": _PRODUCTS_S}, deadline)
        self.best = max(self.best, sum(answer["flops_per_s"] for answer in answers))

    def close(self) -> None:
        self._fleet.close()


def race(
    contestants: Sequence[Contestant],
    workload: Workload,
    precision: str,
    *,
    threads: int,
    rounds: int,
    deadline: float,
    say: Say,
) -> Race:
    """Let the contestants take turns, up to `rounds` rounds and not past `deadline` (`time.monotonic`).

    One contestant computes at a time; who begins moves on by one each round. One that fails drops out.
    """
    lanes = [Lane(contestant, workload, precision, threads) for contestant in contestants]
    done = Race(precision, max(contestant.world for contestant in contestants), [lane.result for lane in lanes])
    products: list[Products] = []
    try:
        worlds = sorted({contestant.world for contestant in contestants})
        products = [Products(workload, precision, world, threads) for world in worlds]
        for lane in lanes:
            lane.launch()
        now = time.monotonic()
        ready = now + _PREPARATION * max(0.0, deadline - now)
        for lane in lanes:
            lane.wait(ready)
        for lane in lanes:
            lane.warm_up(ready)
            say(f"  {precision} {lane.result.contestant.name}: {lane.result.failure or 'ready'}")
        done.rounds = _run_rounds(lanes, products, rounds, deadline)
        for lane in lanes:
            lane.read_memory(time.monotonic() + 30.0)
    except ContestantFailed as failure:  # of the products: what has been measured stands
        say(f"  {precision} matrix products: {failure}")
    finally:
        for each in (*lanes, *products):
            each.close()
    done.products = {each.world: each.best for each in products}
    for lane in lanes:
        if not lane.result.seconds and lane.result.failure is None:
            lane.result.failure = "out of time"
    return done


def _run_rounds(lanes: list[Lane], products: list[Products], rounds: int, deadline: float) -> int:
    """Rounds that all who still run have finished. The next begins only if it should end before the deadline."""
    longest = 0.0
    for number in range(rounds):
        start = time.monotonic()
        if number and start + longest > deadline:
            return number
        for each in products:
            each.turn(max(deadline, start + 10.0))
        first = number % len(lanes)
        for lane in lanes[first:] + lanes[:first]:
            lane.turn(deadline)
        longest = max(longest, time.monotonic() - start)
    return rounds


def measure_memory(
    contestants: Sequence[Contestant], workload: Workload, precision: str, *, threads: int, deadline: float, say: Say
) -> Race:
    """Three steps of each contestant alone, one after the other: memory only, so that large models fit."""
    done = Race(precision, max(contestant.world for contestant in contestants), [])
    for contestant in contestants:
        lane = Lane(contestant, workload, precision, threads)
        done.results.append(lane.result)
        try:
            lane.launch()
            lane.wait(deadline)
            lane.warm_up(deadline)
            for _ in range(2):
                lane.turn(deadline)
            lane.read_memory(deadline)
        finally:
            lane.close()
        say(f"  {precision} {contestant.name}: {lane.result.failure or 'measured'}")
    return done
