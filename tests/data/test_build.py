"""The `data` section made into datasets, and a wrong tokenizer noticed."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron.config.data import DataConfig
from megatron.data import build
from megatron.data.blend import MegatronBlend, StableBlend
from megatron.data.build import (
    build_train_dataset,
    build_validation_dataset,
    check_tokenizer,
    data_prefixes,
    open_pairs,
)
from megatron.data.dataset import ENDLESS, Dataset
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset
from megatron.data.provenance import Provenance, provenance_path, write_provenance
from megatron.data.synthetic import SyntheticDataset
from megatron.utils.errors import ConfigError, DataError

from .conftest import MakePair


def train(config: DataConfig, samples: int = 30) -> Dataset:
    return build_train_dataset(config, sequence_length=4, samples=samples, vocab_size=1000)


def validation(config: DataConfig, samples: int) -> Dataset | None:
    return build_validation_dataset(config, sequence_length=4, samples=samples, vocab_size=1000)


@pytest.fixture
def pairs(make_pair: MakePair) -> tuple[str, str]:
    return make_pair([range(60), range(60, 85)], name="first"), make_pair([range(500, 533)], name="second")


def test_one_prefix_is_that_pair_in_the_asked_order(pairs: tuple[str, str]) -> None:
    dataset = train(DataConfig(train=pairs[0], seed=7))
    direct = MegatronOrderDataset(pairs[0], sequence_length=4, samples=30, seed=7)
    assert len(dataset) == len(direct) >= 30
    assert [dataset.sample(i).tolist() for i in range(30)] == [direct.sample(i).tolist() for i in range(30)]
    stable = train(DataConfig(train=pairs[0], seed=7, order="stable"))
    expected = StableOrderDataset(pairs[0], sequence_length=4, seed=7)
    assert [stable.sample(i).tolist() for i in range(30)] == [expected.sample(i).tolist() for i in range(30)]


def test_a_blend_of_one_is_no_blend(pairs: tuple[str, str]) -> None:
    """Its order would otherwise be that of half a per cent more samples."""
    one = train(DataConfig(train=((3.0, pairs[0]),)), samples=20)
    plain = train(DataConfig(train=pairs[0]), samples=20)
    assert [one.sample(i).tolist() for i in range(20)] == [plain.sample(i).tolist() for i in range(20)]
    assert isinstance(train(DataConfig(train=((3.0, pairs[0]),), order="stable")), StableOrderDataset)


@pytest.mark.parametrize(("order", "kind"), [("megatron", MegatronBlend), ("stable", StableBlend)])
def test_blends_draw_on_their_members_by_weight(pairs: tuple[str, str], order: str, kind: type) -> None:
    dataset = train(DataConfig(train=((1.5, pairs[0]), (0.5, pairs[1])), order=order), samples=400)
    assert isinstance(dataset, kind)
    assert len(dataset) == (400 if order == "megatron" else ENDLESS)
    from_second = sum(int(dataset.sample(i)[0]) >= 500 for i in range(400))
    assert from_second == 100


def test_megatron_members_are_built_with_the_surplus_and_the_same_seed(pairs: tuple[str, str]) -> None:
    dataset = train(DataConfig(train=((0.7, pairs[0]), (0.3, pairs[1])), seed=5), samples=1000)
    members = [
        MegatronOrderDataset(prefix, sequence_length=4, samples=samples, seed=5)
        for prefix, samples in zip(pairs, (704, 302), strict=True)
    ]
    assert [dataset.sample(i).tolist() for i in range(5)] == [
        members[member].sample(index).tolist() for member, index in ((0, 0), (1, 0), (0, 1), (0, 2), (1, 1))
    ]


def test_stable_order_goes_on_alike_when_the_run_is_extended(pairs: tuple[str, str]) -> None:
    config = DataConfig(train=((0.7, pairs[0]), (0.3, pairs[1])), order="stable")
    short, long = train(config, samples=10), train(config, samples=10_000)
    assert [short.sample(i).tolist() for i in range(50)] == [long.sample(i).tolist() for i in range(50)]


def test_synthetic_data_stay_in_the_vocabulary_and_differ_between_training_and_validation() -> None:
    config = DataConfig(train="synthetic", validation="synthetic", seed=2)
    dataset, held_out = train(config), validation(config, 8)
    assert isinstance(dataset, SyntheticDataset) and held_out is not None
    assert len(held_out) == 8
    assert 0 <= dataset.sample(0).min() and dataset.sample(0).max() < 1000
    assert dataset.sample(0).tolist() != held_out.sample(0).tolist()


def test_validation_is_the_beginning_of_each_stream_in_file_order(pairs: tuple[str, str]) -> None:
    assert validation(DataConfig(), 8) is None
    single = validation(DataConfig(validation=pairs[0]), 3)
    assert single is not None
    assert [single.sample(i).tolist()[:2] for i in range(len(single))] == [[0, 1], [4, 5], [8, 9]]
    blended = validation(DataConfig(validation=((0.75, pairs[0]), (0.25, pairs[1]))), 8)
    assert blended is not None
    assert [int(blended.sample(i)[0]) for i in range(len(blended))] == [0, 4, 8, 12, 16, 20, 500, 504]
    everything = validation(DataConfig(validation=pairs[1]), 1000)
    assert everything is not None
    assert len(everything) == 8


def test_no_training_data_is_an_error_that_says_what_to_set() -> None:
    with pytest.raises(ConfigError, match=r"data.train is not set"):
        train(DataConfig())


def test_a_missing_prefix_in_a_blend_is_named(pairs: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="third"):
        train(DataConfig(train=((0.5, pairs[0]), (0.5, pairs[0] + "/third"))))


def test_prefixes_of_a_configuration_come_once(pairs: tuple[str, str]) -> None:
    first, second = pairs
    assert data_prefixes(DataConfig(train=((1.0, first), (2.0, second)), validation=first)) == [first, second]
    assert data_prefixes(DataConfig(train="synthetic")) == []


PROVENANCE = Provenance(
    tokenizer="tokenizer.model",
    tokenizer_fingerprint="ab" * 32,
    vocabulary_size=1000,
    added_tokens=["<x>"],
    eod_id=2,
    append_eod=True,
    json_key="text",
    dtype="uint16",
    documents=1,
    tokens=33,
    sources=[],
)


def test_a_wrong_tokenizer_and_a_too_large_vocabulary_are_noticed(
    pairs: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Added tokens are part of a fingerprint, so those of the pair are added before fingerprints are compared."""

    def load(path: Path, added: list[str]) -> SimpleNamespace:
        assert added == ["<x>"]
        return SimpleNamespace(fingerprint=path.name * 32)

    monkeypatch.setattr(build, "load_tokenizer", load)
    prefix = pairs[1]
    write_provenance(prefix, PROVENANCE)
    check_tokenizer([prefix], Path("ab"), 1000)
    check_tokenizer([prefix], None, 1024)
    with pytest.raises(DataError, match=r"second was made with another tokenizer.*abababababab.*cdcdcdcdcdcd"):
        check_tokenizer([prefix], Path("cd"), 1000)
    with pytest.raises(DataError, match=r"vocabulary of 1,000 .*1 added tokens.* the model has 999"):
        check_tokenizer([prefix], None, 999)


def test_every_member_of_a_blend_that_cannot_be_used_is_named(pairs: tuple[str, str], tmp_path: Path) -> None:
    write_provenance(pairs[1], PROVENANCE)
    with pytest.raises(DataError) as caught:
        check_tokenizer([str(tmp_path / "none"), pairs[0], pairs[1]], None, 999)
    for problem in ("2 of the data's pairs", "no token data at", "vocabulary of 1,000"):
        assert problem in str(caught.value)
    for prefix in pairs:
        with open(f"{prefix}.bin", "ab") as file:
            file.write(b"more")
    with pytest.raises(DataError, match=r"first\.bin is [^-]*\n  - .*second\.bin is"):
        open_pairs(pairs)


def test_a_pair_without_provenance_passes_with_a_message(
    pairs: tuple[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="megatron"):
        check_tokenizer([pairs[0]], Path("ab"), 10)
    assert "first.json is not there" in caplog.text


def test_a_provenance_of_another_pair_or_damaged_is_an_error(pairs: tuple[str, str]) -> None:
    write_provenance(pairs[1], dataclasses.replace(PROVENANCE, tokens=32))
    with pytest.raises(DataError, match=r"describes 64 bytes.*second.bin has 66"):
        check_tokenizer([pairs[1]], None, 1000)
    path = provenance_path(pairs[1] + ".bin")
    assert path == Path(f"{pairs[1]}.json")
    for content in ("{", "[]", "{}", '{"tokens": 3}'):
        path.write_text(content)
        with pytest.raises(DataError, match=r"second.json is not what .megatron preprocess. writes"):
            check_tokenizer([pairs[1]], None, 1000)
