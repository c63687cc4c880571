"""The hooks of a run: what is reported, evaluated and saved after which step, and in whose words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager

from megatron.config.batches import Ramp
from megatron.config.run import RunConfig
from megatron.evaluate.perplexity import Evaluation
from megatron.parallel.world import World
from megatron.train.datasets import count_documents
from megatron.train.hooks import Hook, Report, Save, Test
from megatron.train.megatron_lines import MegatronLines
from megatron.train.megatron_tags import open_tags
from megatron.train.metrics import Metrics
from megatron.train.sinks import Sink
from megatron.train.state import Progress

Evaluate = Callable[[], Evaluation]


def build_hooks(
    config: RunConfig,
    metrics: Metrics,
    sinks: Sequence[Sink],
    lines: MegatronLines | None,
    *,
    validate: Evaluate | None,
    test: Evaluate | None,
    save: Callable[[], None],
    progress: Progress,
    read_so_far: Callable[[int], Mapping[str, float | int]],
) -> list[Hook]:
    """In the order in which they run; `lines` first, since its line is of the step and not of what follows."""
    if lines is not None:
        validate = None if validate is None else _told_validation(config, lines, validate, progress)
        test = None if test is None else _told_test(lines, test)
    report = Report(
        metrics,
        sinks,
        steps=config.train.steps,
        interval=config.log.interval,
        evaluate=validate,
        evaluate_interval=config.evaluate.interval,
        read_so_far=read_so_far,
    )
    hooks: list[Hook] = [] if lines is None else [lines]
    hooks += [report, Save(save, metrics, config.checkpoint.interval)]
    return hooks if test is None else [*hooks, Test(metrics, sinks, test)]


@contextmanager
def open_lines(
    config: RunConfig, world: World, ramp: Ramp, decay_steps: int, progress: Progress, sinks: Sequence[Sink]
) -> Iterator[MegatronLines | None]:
    """Megatron-LLM's log lines, where `log.megatron_llm` asks for them, and its tags beside what goes to `sinks`; the
    lines of the beginning are printed."""
    if not config.log.megatron_llm or progress.step >= config.train.steps:
        yield None
        return
    with ExitStack() as stack:
        tags = world.agree(lambda: open_tags(config.log, sinks) if world.launch.rank == 0 else None)
        if tags is not None:
            stack.callback(tags.close)
        lines = MegatronLines(config, world, ramp, decay_steps, progress, tags)
        lines.begin(world.agree(lambda: count_documents(config)))
        yield lines


def told_save(
    config: RunConfig, lines: MegatronLines | None, save: Callable[[], None], progress: Progress
) -> Callable[[], None]:
    """`save`, with the lines around it; the last step of a run may be saved by a hook and again at the end."""
    folder = config.checkpoint.save
    if lines is None or folder is None:
        return save
    told = lines
    saved: set[int] = set()

    def run() -> None:
        if progress.step in saved:
            return
        with told.saving(progress.step, folder):
            save()
        saved.add(progress.step)

    return run


def _told_validation(config: RunConfig, lines: MegatronLines, validate: Evaluate, progress: Progress) -> Evaluate:
    interval, timed = config.evaluate.interval, lines.timed(validate)
    assert interval is not None

    def run() -> Evaluation:
        evaluation = timed()
        if progress.step % interval == 0:
            lines.validated(evaluation, progress)
        if progress.step == config.train.steps:
            lines.evaluated(evaluation, "the end of training for val data")
        return evaluation

    return run


def _told_test(lines: MegatronLines, test: Evaluate) -> Evaluate:
    timed = lines.timed(test)

    def run() -> Evaluation:
        evaluation = timed()
        lines.evaluated(evaluation, "the end of training for test data")
        return evaluation

    return run
