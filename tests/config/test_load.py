"""Files, presets, bases and overrides become one configuration, or one error that names everything wrong."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron.config import yaml_text
from megatron.config.dump import differences, dump_config, to_dict
from megatron.config.load import config_from_dict, load_config
from megatron.config.overrides import split_overrides
from megatron.config.run import RunConfig
from megatron.config.schema import all_keys
from megatron.utils.errors import ConfigError


def write(folder: Path, text: str, name: str = "run.yaml") -> str:
    path = folder / name
    path.write_text(text)
    return str(path)


def failure(config: str | None, *overrides: str) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(config, overrides)
    return str(caught.value)


def test_without_a_file_the_defaults_hold() -> None:
    assert load_config(None) == RunConfig()


def test_the_number_of_keys_stays_small() -> None:
    assert len(all_keys()) <= 150
    assert all(key.info.doc.endswith((".", ".)")) for key in all_keys().values())


def test_a_file_sets_what_it_names_and_nothing_else(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "train:\n  steps: 7\noptimizer:\n  learning_rate: 1e-4\n"))
    assert differences(to_dict(RunConfig()), to_dict(config)) == [
        "optimizer.learning_rate: 0.0003 -> 0.0001",
        "train.steps: 100 -> 7",
    ]


def test_an_empty_file_and_empty_sections_are_the_defaults(tmp_path: Path) -> None:
    assert load_config(write(tmp_path, "# nothing yet\n")) == RunConfig()
    assert load_config(write(tmp_path, "train:\ndata:\n")) == RunConfig()


def test_later_sources_win_base_then_file_then_command_line(tmp_path: Path) -> None:
    (tmp_path / "bases").mkdir()
    write(tmp_path / "bases", "train: {steps: 1, seed: 1, global_batch: 16}\n", "base.yaml")
    path = write(tmp_path, "base: bases/base.yaml\ntrain: {steps: 2, seed: 2}\n")
    train = load_config(path, ["--train.steps", "3"]).train
    assert (train.steps, train.seed, train.global_batch) == (3, 2, 16)


def test_a_base_may_be_a_preset(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "base: tiny\nmodel:\n  num_hidden_layers: 2\n"))
    assert config.model.num_hidden_layers == 2
    assert config.data.train == "synthetic"


def test_a_base_has_no_base(tmp_path: Path) -> None:
    write(tmp_path, "base: tiny\n", "middle.yaml")
    assert "only one level" in failure(write(tmp_path, "base: middle.yaml\n"))


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--optimizer.learning_rate", "1e-4"], 1e-4),
        (["--optimizer.learning_rate=1e-4"], 1e-4),
        (["--optimizer.learning_rate", "1"], 1.0),
        (["--optimizer.learning-rate", "2.5E-5"], 2.5e-5),
    ],
)
def test_overrides_in_both_spellings(words: list[str], expected: float) -> None:
    value = load_config(None, words).optimizer.learning_rate
    assert value == expected
    assert isinstance(value, float)


def test_override_values_are_yaml() -> None:
    words = ["--data.train", "[[1, a], [2.5, b]]", "--parallel.sequence", "true", "--train.steps", "1e3"]
    config = load_config(None, [*words, "--optimizer.decay_steps", "null", "--optimizer.decay_steps", "~"])
    assert config.data.train == ((1.0, "a"), (2.5, "b"))
    assert config.parallel.sequence is True
    assert config.train.steps == 1000
    assert isinstance(config.train.steps, int)
    assert config.optimizer.decay_steps is None


@pytest.mark.parametrize("text", ["2024", "2024-01-01", "1e-4", "true", "no", "010", "a=b", "."])
def test_a_word_that_looks_like_something_else_is_text_where_text_is_wanted(text: str) -> None:
    config = load_config(None, [f"--log.dir={text}", "--data.train", text])
    assert (config.log.dir, config.data.train) == (text, text)
    assert config_from_dict(yaml_text.parse(dump_config(config)), "here") == config
    assert load_config(None, ["--log.dir", "null"]).log.dir is None


def test_the_last_of_several_overrides_wins() -> None:
    assert load_config(None, ["--train.steps", "1", "--train.steps=2"]).train.steps == 2


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("--train.step=1", "unknown key train.step; did you mean train.steps?"),
        ("--train.learning_rate=1", "did you mean optimizer.learning_rate?"),
        ("--optimiser.eps=1", "did you mean optimizer.eps?"),
        ("--parallel.tensor_parallel=1", "did you mean parallel.tensor?"),
        ("--trian.zzz=1", "unknown key trian.zzz; did you mean train?"),
        ("--evaluate.zzzz=1", "the keys of evaluate are interval, batches"),
        ("--xyzzy.qqq=1", "the sections are model, lora, parallel, data"),
    ],
)
def test_an_unknown_key_names_the_nearest_known_one(override: str, hint: str) -> None:
    assert hint in failure(None, override)


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("trian:\n  steps: 1\n", "unknown section 'trian'; did you mean train?"),
        ("train.steps: 1\n", "write `train:` and, indented below it, `steps: ...`"),
        ("train: 5\n", "train is a section and takes keys"),
        ("- train\n", "must hold sections"),
        ("train:\n  steps: 1\n  steps: 2\n", "'steps' is given twice"),
        ("train: [\n", "is not YAML"),
        ("train:\n  1: 2\n", "unknown key train.1"),
        ("base: [a]\n", "must be a path or the name of a preset"),
        ("base: elsewhere.yaml\n", "elsewhere.yaml and no preset"),
        ("train: {steps: true}\n", "train.steps=true must be a whole number"),
        ("train: {steps: 1.5}\n", "train.steps=1.5 must be a whole number"),
        ("train: {steps: null}\n", "must not be null; the default is 100"),
        ("train: {steps: 0}\n", "train.steps=0 must be at least 1"),
        ("train: {deterministic: 1}\n", "must be true or false"),
        ("train: {precision: bf32}\n", "must be one of bf16, fp32, fp64; did you mean"),
        ("optimizer: {beta1: 1.0}\n", "must be below 1"),
        ("optimizer: {eps: .nan}\n", "must be a finite number"),
        ("optimizer: {eps: 0}\n", "must be above 0"),
        ("optimizer: {eps: '1'}\n", "must be a number"),
        ("parallel: {zero: 4}\n", "must be at most 3"),
        ("log: {dir: ''}\n", "must not be empty"),
        ('log: {dir: "a\\tb"}\n', "characters that cannot be printed: 'a\\tb'"),
        ("log: {dir: 5}\n", "put it in quotes"),
        ("data: {train: []}\n", "must be a prefix or a list of [weight, prefix] pairs"),
        ("data: {train: [a, a]}\n", "names a twice in a blend"),
        ("data: {train: [[1, a], [null, b]]}\n", "gives some of its pairs a weight and others none"),
        ("data: {train: [{from_tokens: 5, blend: a}]}\n", "begins its parts at [5] from_tokens: the first begins at 0"),
        (
            "data: {train: [{from_tokens: 0, blend: a}, {from_tokens: 0, blend: b}]}\n",
            "each later than the one before",
        ),
        ("data: {train: [{from: 0, blend: a}]}\n", "has the entry {from: 0, blend: a}: blends that follow each other"),
        ("data: {train: [{from_tokens: 0, blend: []}]}\n", "has the blend []: a blend is a prefix or a list"),
        ("train: {global_batch: []}\n", "must be a whole number, or a list of"),
        ("train: {global_batch: [[0, 8], [5, 0]]}\n", "must be at least 1"),
        ("train: {global_batch: [[0, 8], [-1, 16]]}\n", "begins its parts at [0, -1] tokens"),
        ("data: {train: [1, a]}\n", "has the entry 1: a blend is"),
        ("data: {train: [[a, 1]]}\n", "has the entry [a, 1]: a blend is"),
        ("data: {train: [[1, a], [0, b]]}\n", "gives b the weight 0"),
        ("data: {train: [[1, a], [-1, b]]}\n", "gives b the weight -1"),
        ("data: {train: [[.inf, a]]}\n", "gives a the weight inf"),
        (
            "data: {train: [[0, a], [1, b], c, [-1, d]]}\n",
            "gives a the weight 0: weights must be above 0; leave the entry out; it has the entry c: a blend is a list "
            "of [weight, prefix] pairs, as [[0.9, medical], [0.1, replay]]; it gives d the weight -1",
        ),
    ],
)
def test_what_is_wrong_in_a_file_is_said_with_its_name(tmp_path: Path, text: str, hint: str) -> None:
    path = write(tmp_path, text)
    message = failure(path)
    assert hint in message
    assert path in message or "elsewhere" in message


def test_overrides_without_value_or_name() -> None:
    assert "--log.dir needs a value" in failure(None, "--log.dir")
    assert "unexpected word 'b]'" in failure(None, "--log.dir", "a", "b]")


def test_a_missing_file_names_the_nearest_preset() -> None:
    assert "did you mean meditron-7b?" in failure("meditron7b")
    assert "the presets are codellama-7b, " in failure("elsewhere/run.yaml")


def test_a_folder_is_no_configuration(tmp_path: Path) -> None:
    assert "cannot read the configuration" in failure(str(tmp_path))


def test_all_problems_are_reported_at_once_and_no_follow_ups() -> None:
    message = failure(
        None,
        *("--train.step", "1", "--train.global_batch", "x", "--train.micro_batch=5"),
        *("--optimizer.learning_rate", "1e-5", "--optimizer.min_learning_rate=1e-4"),
    )
    assert message.startswith("the configuration has 3 problems:")
    assert "unknown key train.step;" in message
    assert "train.global_batch=x must be a whole number (command line)" in message
    assert "optimizer.min_learning_rate=0.0001 is above" in message
    # The micro batch cannot be judged while the global batch is unknown: the default is not what was asked for.
    assert "divisible" not in message


def test_overrides_are_told_from_other_words() -> None:
    words = ["--config", "a.yaml", "--train.steps", "5", "--load", "x", "--log.dir=y", "z", "--data.seed", "--help"]
    assert split_overrides(words) == (
        ["--train.steps", "5", "--log.dir=y", "--data.seed"],
        ["--config", "a.yaml", "--load", "x", "z", "--help"],
    )


def test_differences_counts_a_missing_key_as_its_default() -> None:
    old = to_dict(load_config("tiny"))
    new = to_dict(load_config("tiny", ["--data.train", "[[1, a]]", "--log.dir", "x"]))
    del old["log"]["dir"], old["train"]["seed"]
    old["train"]["retired"] = 3
    assert differences(old, new) == [
        "data.train: synthetic -> [[1.0, a]]",
        "log.dir: null -> x",
        "train.retired: 3 -> null",
    ]


words = st.text(min_size=1).filter(lambda text: text.strip() != "" and text.isprintable())
weighted = st.lists(st.tuples(st.floats(1e-9, 1e9), words), min_size=1, max_size=4, unique_by=lambda pair: pair[1])
blends = weighted | st.lists(words, min_size=1, max_size=4, unique=True)
stages = st.lists(blends, min_size=1, max_size=3).map(
    lambda following: [{"from_tokens": 100 * number, "blend": blend} for number, blend in enumerate(following)]
)
sources = words | blends | stages
batches = st.integers(1, 99) | st.lists(st.integers(1, 99), min_size=1, max_size=3).map(
    lambda sizes: [[1000 * number, size] for number, size in enumerate(sizes)]
)


@given(
    folder=words,
    source=sources,
    batch=batches,
    rate=st.floats(0, 1e6),
    seed=st.integers(0, 2**32 - 1),
    sequence=st.sampled_from([None, True, False]),
)
def test_what_is_written_is_read_back_identically(
    folder: str, source: object, batch: object, rate: float, seed: int, sequence: bool | None
) -> None:
    values = {
        "log": {"dir": folder},
        "data": {"train": source, "seed": seed},
        "train": {"global_batch": batch},
        "optimizer": {"learning_rate": rate},
        "parallel": {"sequence": sequence},
    }
    config = config_from_dict(values, "here")
    assert config_from_dict(yaml_text.parse(dump_config(config)), "there") == config


def test_the_dump_is_readable_and_loads_as_a_file(tmp_path: Path) -> None:
    config = load_config("meditron-7b", ["--data.train", "[[1, 'a b'], [2, c]]"])
    text = dump_config(config)
    assert "train:\n  steps: 14252\n" in text
    assert "  train: [[1.0, a b], [2.0, c]]\n" in text
    assert load_config(write(tmp_path, text)) == config
