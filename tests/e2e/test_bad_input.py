"""Bad input: one clear error on every rank, exit code 2, no traceback, nothing lost."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file, save_file

from megatron.data.indexed import IndexedWriter

from .material import Material
from .program import Program

Break = Callable[[Material, Path], tuple[list[str], str]]


def _unknown_keys(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--train.stepz", "3", "--optimzer.eps", "1"], "did you mean train.steps.*\n.*did you mean optimizer.eps"


def _impossible_grid(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--parallel.tensor", "3"], "parallel.tensor=3"


def _uneven_batch(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--train.global_batch", "7"], "train.global_batch=7"


def _missing_data(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--data.train", str(folder / "nothing")], "no token data at .*nothing"


def _truncated_data(material: Material, folder: Path) -> tuple[list[str], str]:
    for ending in (".bin", ".idx"):
        shutil.copy(f"{material.data}{ending}", folder / f"cut{ending}")
    content = (folder / "cut.bin").read_bytes()
    (folder / "cut.bin").write_bytes(content[: len(content) // 2])
    return ["--data.train", str(folder / "cut")], "cut.bin is .* bytes.*truncated"


def _small_vocabulary(material: Material, folder: Path) -> tuple[list[str], str]:
    """The data hold ids that a model with fewer tokens does not have."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    words = [word for name, size in sizes.items() for word in (f"--model.{name}", str(size))]
    return ["--model.init_from", "null", "--model.vocab_size", "40", *words], "vocabulary of 40|the model has 40"


def _wrong_tokenizer(material: Material, folder: Path) -> tuple[list[str], str]:
    for ending in (".bin", ".idx"):
        shutil.copy(f"{material.data}{ending}", folder / f"other{ending}")
    tokens = (folder / "other.bin").stat().st_size // 2
    record = {
        "tokenizer": "tokenizer.model",
        "tokenizer_fingerprint": "0" * 64,
        "vocabulary_size": 3,
        "added_tokens": [],
        "eod_id": 2,
        "append_eod": True,
        "json_key": "text",
        "dtype": "uint16",
        "documents": 1,
        "tokens": tokens,
        "sources": [],
    }
    (folder / "other.json").write_text(json.dumps(record))
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text(
        json.dumps({"version": "1.0", "added_tokens": [], "model": {"type": "BPE", "vocab": {"a": 0}, "merges": []}})
    )
    return ["--data.train", str(folder / "other"), "--tokenizer.path", str(tokenizer)], "made with another tokenizer"


def _unwritable_folder(material: Material, folder: Path) -> tuple[list[str], str]:
    (folder / "file").write_text("")
    return ["--checkpoint.save", str(folder / "file" / "checkpoints")], "checkpoint.save: cannot write"


def _saves_into_a_model(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--checkpoint.save", str(material.model)], "checkpoint.save=.* is the folder of a model.*model.init_from"


def _no_model_there(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--model.init_from", str(folder)], "neither a model nor a checkpoint"


def _contradicting_model(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--model.num_hidden_layers", "99"], "contradicts.*model.num_hidden_layers=99"


def _not_a_checkpoint(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--checkpoint.load", str(material.model)], "no training state.*model.init_from"


def _long_sequences(material: Material, folder: Path) -> tuple[list[str], str]:
    return ["--data.sequence_length", "1000000"], "data.sequence_length=1000000"


BREAKS = [
    _unknown_keys,
    _impossible_grid,
    _uneven_batch,
    _missing_data,
    _truncated_data,
    _small_vocabulary,
    _wrong_tokenizer,
    _unwritable_folder,
    _saves_into_a_model,
    _no_model_there,
    _contradicting_model,
    _not_a_checkpoint,
    _long_sequences,
]


def _train(material: Material) -> list[str]:
    words = f"--model.init_from {material.model} --data.train {material.data} --data.sequence_length 32"
    return ["train", *words.split(), *["--train.steps", "2", "--train.precision", "fp32", "--train.global_batch", "4"]]


@pytest.mark.parametrize(
    ("broken", "ranks"),
    [(broken, ranks) for broken in BREAKS for ranks in (1, 2) if (broken, ranks) != (_uneven_batch, 1)],
    ids=lambda value: value.__name__.strip("_") if callable(value) else str(value),
)
def test_one_clear_error(broken: Break, ranks: int, program: Program, llama: Material, tmp_path: Path) -> None:
    words, expected = broken(llama, tmp_path)
    result = program.run([*_train(llama), *words], ranks, expect=2)
    assert "Traceback" not in result.errors
    assert result.errors.count("error:") == 1, result.errors
    assert re.search(expected, result.errors, flags=re.DOTALL), result.errors
    assert result.output == ""


def test_under_torchrun_it_is_said_once(program: Program, llama: Material) -> None:
    """torchrun reports the exit codes itself, and ends with 1."""
    ended = program.torchrun([*_train(llama), "--train.stepz", "3"], 2)
    assert ended.returncode == 1
    assert ended.stderr.count("did you mean train.steps") == 1
    assert "train.stepz" not in ended.stdout


@pytest.mark.parametrize("words", [["--train.stepz", "3"], ["--data.train", "nothing"]], ids=["each", "agreed"])
def test_every_process_ends_with_the_code_of_the_error(program: Program, llama: Material, words: list[str]) -> None:
    """Also those that torchrun would end: its report has the exit code of each, and -15 for a process it killed."""
    ended = program.torchrun([*_train(llama), *words], 2)
    assert ended.stderr.count("error:") == 1, ended.stderr
    assert re.findall(r"exitcode +: (\S+)", ended.stderr) == ["2"] * 2, ended.stderr


def test_a_token_outside_the_vocabulary_stops_all_ranks_after_a_save(
    program: Program, llama: Material, tmp_path: Path
) -> None:
    """Bad data in the middle of a run: what was trained until then is saved, and the sample is named."""
    with IndexedWriter(tmp_path / "bad", np.uint16) as writer:
        for number in range(40):
            writer.add_sequence(np.full(33, 60_000 if number == 30 else 5, dtype=np.uint16))
            writer.end_document()
    words = [*_train(llama), "--data.train", tmp_path / "bad", "--data.order", "stable", "--train.steps", "30"]
    result = program.run([*words, "--checkpoint.save", tmp_path / "save"], 2, expect=2)
    assert result.errors.count("error:") == 1 and "holds the token 60000" in result.errors
    assert "Traceback" not in result.errors
    saved = sorted(path.name for path in (tmp_path / "save").glob("step_*"))
    assert len(saved) == 1, saved


@pytest.mark.parametrize("ranks", [1, 2])
def test_bad_validation_data_that_one_rank_reads_stops_all_after_a_save(
    program: Program, llama: Material, tmp_path: Path, ranks: int
) -> None:
    """The last of the windows is bad: on two ranks only the second reads it."""
    with IndexedWriter(tmp_path / "bad", np.uint16) as writer:
        tokens = np.full(4 * 32 + 1, 5, dtype=np.uint16)
        tokens[-1] = 60_000
        writer.add_sequence(tokens)
        writer.end_document()
    words = [
        *_train(llama),
        "--data.validation",
        tmp_path / "bad",
        "--evaluate.interval",
        "1",
        "--evaluate.batches",
        "1",
    ]
    result = program.run([*words, "--checkpoint.save", tmp_path / "save"], ranks, expect=2)
    assert result.errors.count("error:") == 1 and "holds the token 60000" in result.errors
    assert "Traceback" not in result.errors
    assert (tmp_path / "save" / "step_0000001" / "checkpoint.json").is_file()
    words = ["evaluate", "--load", llama.model, "--data", tmp_path / "bad", "--sequence-length", "32"]
    result = program.run(words, ranks, expect=2)
    assert result.errors.count("error:") == 1 and "holds the token 60000" in result.errors
    assert result.output == ""


def test_a_run_that_makes_no_updates_ends_without_a_save(program: Program, llama: Material, tmp_path: Path) -> None:
    """A weight that is not finite: no gradient is, on any rank, and all end alike."""
    shutil.copytree(llama.model, tmp_path / "model")
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"][0] = float("nan")
    save_file(weights, path, {"format": "pt"})
    words = [*_train(llama), "--model.init_from", tmp_path / "model", "--train.steps", "30", "--log.interval", "4"]
    result = program.run([*words, "--checkpoint.save", tmp_path / "save"], 2, expect=2)
    assert result.errors.count("error:") == 1 and "of steps 1 to 12, were skipped" in result.errors
    assert "Traceback" not in result.errors
    assert not any((tmp_path / "save").iterdir())
