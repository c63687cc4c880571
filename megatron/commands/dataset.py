"""`megatron dataset`: look into token files, and say which documents a step of a run reads."""

from __future__ import annotations

import argparse
import json
from typing import TYPE_CHECKING

from megatron.utils.errors import ConfigError, DataError

if TYPE_CHECKING:
    from megatron.config.run import RunConfig
    from megatron.train.explain import Explanation, Row

HELP = "verify and sample token files, and say what a step of a run reads"
TAKES_OVERRIDES = True

_MOST_TOKENS = 400


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of the verb."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="ACTION")
    verify = actions.add_parser("verify", help="read pairs through: structure, vocabulary, checksums")
    verify.add_argument("prefixes", nargs="+", metavar="PREFIX", help="prefixes of .bin/.idx pairs")
    sample = actions.add_parser("sample", help="print some documents of a pair")
    sample.add_argument("prefix", metavar="PREFIX", help="prefix of the .bin/.idx pair")
    sample.add_argument("--documents", type=int, default=3, metavar="N", help="how many (default %(default)s)")
    sample.add_argument("--first", type=int, metavar="N", help="documents from this one on, instead of random ones")
    sample.add_argument("--seed", type=int, default=0, help="of the random choice (default %(default)s)")
    sample.add_argument("--tokenizer", metavar="T", help="tokenizer to decode them with; without it, ids are printed")
    sample.add_argument(
        "--tokens", type=int, default=_MOST_TOKENS, metavar="N", help="at most so many of each (default %(default)s)"
    )
    explain = actions.add_parser("explain", help="which documents a step of a run reads on a rank")
    _add_run_arguments(explain)
    explain.add_argument("--step", type=int, required=True, metavar="N", help="the step, from 1")
    explain.add_argument("--rank", type=int, default=0, metavar="R", help="the global rank (default %(default)s)")
    explain.add_argument(
        "--processes", type=int, metavar="N", help="of the run (default: of its newest checkpoint in checkpoint.save)"
    )
    explain.add_argument(
        "--position", type=int, metavar="N", help="first sample of the step, where the configuration does not tell"
    )
    ledger = actions.add_parser("ledger", help="how much of each source a run has read after a step")
    _add_run_arguments(ledger)
    ledger.add_argument("--step", type=int, metavar="N", help="after this step (default: train.steps)")
    ledger.add_argument(
        "--position", type=int, metavar="N", help="after so many samples, where the configuration does not tell"
    )


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", metavar="FILE", help="configuration file of the run, or the name of a preset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")


def run(arguments: argparse.Namespace) -> int:
    """Do what was asked for. Raises MegatronError for what is not there or damaged."""
    if arguments.action in ("verify", "sample") and arguments.overrides:
        raise ConfigError(f"megatron dataset {arguments.action} takes no keys of the configuration")
    if arguments.unrecognized:
        raise ConfigError(f"unrecognized arguments: {' '.join(arguments.unrecognized)}; see megatron dataset --help")
    return {"verify": _verify, "sample": _sample, "explain": _explain, "ledger": _ledger}[arguments.action](arguments)


def _verify(arguments: argparse.Namespace) -> int:
    from megatron.data.describe import verify_pair

    problems = []
    for prefix in arguments.prefixes:
        try:
            print(f"{prefix}: right are {verify_pair(prefix)}", flush=True)
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError(problems[0] if len(problems) == 1 else "\n  - ".join(["several are damaged:", *problems]))
    return 0


def _sample(arguments: argparse.Namespace) -> int:
    from megatron.data.sample import sample_documents

    for document in sample_documents(
        arguments.prefix,
        documents=arguments.documents,
        first=arguments.first,
        seed=arguments.seed,
        tokenizer=arguments.tokenizer,
        most_tokens=arguments.tokens,
    ):
        where = "" if document.line is None else f", {document.line[0]} line {document.line[1]:,}"
        print(f"--- document {document.number:,}, {document.tokens:,} tokens{where}")
        print(document.text + (" …" if document.cut else ""))
    return 0


def _explain(arguments: argparse.Namespace) -> int:
    from megatron.train.explain import explain_step, to_json
    from megatron.train.origin import describe_model

    config = _load(arguments)
    explanation = explain_step(
        config,
        describe_model(config)[0],
        processes=arguments.processes,
        rank=arguments.rank,
        step=arguments.step,
        position=arguments.position,
    )
    print(json.dumps(to_json(explanation)) if arguments.json else _to_text(explanation, arguments.rank))
    return 0


def _ledger(arguments: argparse.Namespace) -> int:
    from dataclasses import asdict

    from megatron.train.explain import ledger_after
    from megatron.train.origin import describe_model

    config = _load(arguments)
    if arguments.step is not None and arguments.position is not None:
        raise ConfigError("--step and --position both say how far the run is; give one of them")
    asked = config.train.steps if arguments.step is None else arguments.step
    samples, accounts = ledger_after(config, describe_model(config)[0], step=asked, position=arguments.position)
    step = asked if arguments.position is None else None
    if arguments.json:
        print(json.dumps({"step": step, "samples": samples, "sources": [asdict(account) for account in accounts]}))
        return 0
    print(f"{'' if step is None else f'after step {step:,}: '}{samples:,} samples")
    if not accounts:
        print("which source they were of is accounted for where the data are token streams only")
    for account in accounts:
        print(f"{account.tokens:>20,} tokens  {account.epochs:>9.4f} epochs  {account.prefix}")
    return 0


def _load(arguments: argparse.Namespace) -> RunConfig:
    from megatron.config.load import load_config

    config = load_config(arguments.config, arguments.overrides)
    if config.data.train is None:
        raise ConfigError("data.train is not set: name the run's configuration with --config")
    return config


def _to_text(explanation: Explanation, rank: int) -> str:
    head = (
        f"step {explanation.step:,}, rank {rank} (data rank {explanation.data_rank} of {explanation.data_ranks}): its "
        f"samples among the {explanation.global_batch:,} from number {explanation.position:,} on"
    )
    return "\n".join([head, *(line for row in explanation.rows for line in _row_lines(row))])


def _row_lines(row: Row) -> list[str]:
    name = f"micro-batch {row.micro_batch}, row {row.row}: sample {row.sample:,}"
    if row.origin is None:
        return [f"{name}: {row.source}"]
    epoch = "" if row.origin.epoch is None else f", epoch {row.origin.epoch}"
    lines = [f"{name} = number {row.origin.number:,} of {row.origin.prefix}{epoch}; SHA-256 {row.sha256}"]
    for excerpt, line in row.origin.excerpts:
        where = "" if line is None else f"  {line[0]} line {line[1]:,}"
        lines.append(f"  document {excerpt.document:,}: tokens {excerpt.start:,} to {excerpt.stop - 1:,}{where}")
    return lines
