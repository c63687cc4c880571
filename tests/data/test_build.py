"""The `data` section made into datasets, and a wrong tokenizer noticed."""

from __future__ import annotations

import dataclasses
import logging
import math
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from megatron.config.data import BlendFrom, DataConfig
from megatron.data import build
from megatron.data.blend import Blend, StableChoices, Stage
from megatron.data.build import (
    build_train_dataset,
    build_validation_datasets,
    check_tokenizer,
    data_prefixes,
    open_pairs,
    open_training_sources,
    source_names,
)
from megatron.data.dataset import ENDLESS, Dataset
from megatron.data.indexed import IndexedReader
from megatron.data.ledger import ledger
from megatron.data.order import megatron_order
from megatron.data.pretraining import MegatronOrderDataset, StableOrderDataset
from megatron.data.provenance import Provenance, provenance_path, write_provenance
from megatron.data.stream import Stream
from megatron.data.synthetic import SyntheticDataset
from megatron.utils.errors import ConfigError, DataError

from .conftest import MakePair


def train(config: DataConfig, samples: int = 30) -> Dataset:
    return build_train_dataset(config, sequence_length=4, samples=samples, vocab_size=1000)


def validation(config: DataConfig, samples: int) -> dict[str, Dataset]:
    return dict(build_validation_datasets(config, sequence_length=4, samples=samples, vocab_size=1000))


def stream(prefix: str) -> Stream:
    return Stream(IndexedReader(prefix))


def firsts(dataset: Dataset) -> list[int]:
    """The first token of each sample."""
    return [int(dataset.sample(i)[0]) for i in range(len(dataset))]


@pytest.fixture
def pairs(make_pair: MakePair) -> tuple[str, str]:
    return make_pair([range(60), range(60, 85)], name="first"), make_pair([range(500, 533)], name="second")


def test_one_prefix_is_that_pair_in_the_asked_order(pairs: tuple[str, str]) -> None:
    dataset = train(DataConfig(train=pairs[0], seed=7))
    direct = MegatronOrderDataset(stream(pairs[0]), sequence_length=4, samples=30, seed=7)
    assert len(dataset) == len(direct) >= 30
    assert [dataset.sample(i).tolist() for i in range(30)] == [direct.sample(i).tolist() for i in range(30)]
    stable = train(DataConfig(train=pairs[0], seed=7, order="stable"))
    expected = StableOrderDataset(stream(pairs[0]), sequence_length=4, seed=7)
    assert [stable.sample(i).tolist() for i in range(30)] == [expected.sample(i).tolist() for i in range(30)]


def test_a_blend_of_one_is_no_blend(pairs: tuple[str, str]) -> None:
    """Its order would otherwise be that of half a per cent more samples."""
    one = train(DataConfig(train=((3.0, pairs[0]),)), samples=20)
    plain = train(DataConfig(train=pairs[0]), samples=20)
    assert [one.sample(i).tolist() for i in range(20)] == [plain.sample(i).tolist() for i in range(20)]
    assert isinstance(train(DataConfig(train=((3.0, pairs[0]),), order="stable")), StableOrderDataset)


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_blends_draw_on_their_members_by_weight(pairs: tuple[str, str], order: str) -> None:
    dataset = train(DataConfig(train=((1.5, pairs[0]), (0.5, pairs[1])), order=order), samples=400)
    assert isinstance(dataset, Blend)
    assert len(dataset) == (400 if order == "megatron" else ENDLESS)
    from_second = sum(int(dataset.sample(i)[0]) >= 500 for i in range(400))
    assert from_second == 100


def test_megatron_members_are_built_with_the_surplus_and_the_same_seed(pairs: tuple[str, str]) -> None:
    dataset = train(DataConfig(train=((0.7, pairs[0]), (0.3, pairs[1])), seed=5), samples=1000)
    members = [
        MegatronOrderDataset(stream(prefix), sequence_length=4, samples=samples, seed=5)
        for prefix, samples in zip(pairs, (704, 302), strict=True)
    ]
    assert [dataset.sample(i).tolist() for i in range(5)] == [
        members[member].sample(index).tolist() for member, index in ((0, 0), (1, 0), (0, 1), (0, 2), (1, 1))
    ]


def test_stable_order_goes_on_alike_when_the_run_is_extended(pairs: tuple[str, str]) -> None:
    config = DataConfig(train=((0.7, pairs[0]), (0.3, pairs[1])), order="stable")
    short, long = train(config, samples=10), train(config, samples=10_000)
    assert [short.sample(i).tolist() for i in range(50)] == [long.sample(i).tolist() for i in range(50)]


def test_the_stable_order_takes_no_memory_that_grows_with_the_data(make_pair: MakePair) -> None:
    """Neither when it is made nor when its first samples are found; a blend has its table, whatever its length."""
    pairs = [make_pair([[1]] * 30_000, name=name) for name in "abc"]
    streams = [stream(prefix) for prefix in pairs]
    indices = 10**12 + np.arange(64)
    StableOrderDataset(streams[0], sequence_length=2, seed=1).windows(indices)  # what is loaded once
    tracemalloc.start()
    members = [StableOrderDataset(one, sequence_length=2, seed=1) for one in streams]
    members[0].windows(indices)
    alone = tracemalloc.get_traced_memory()[1]
    blend = Blend(members, [Stage(0, StableChoices([0.6, 0.1, 0.3]), (0, 1, 2))])
    blend.locate(indices)
    kept = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert alone < 100_000 and kept < 1_000_000


def test_synthetic_data_stay_in_the_vocabulary_and_differ_between_training_and_validation() -> None:
    config = DataConfig(train="synthetic", validation="synthetic", seed=2)
    dataset, held_out = train(config), validation(config, 8)["synthetic"]
    assert isinstance(dataset, SyntheticDataset)
    assert len(held_out) == 8
    assert 0 <= dataset.sample(0).min() and dataset.sample(0).max() < 1000
    assert dataset.sample(0).tolist() != held_out.sample(0).tolist()


def test_validation_is_the_beginning_of_each_stream_in_file_order(pairs: tuple[str, str]) -> None:
    assert validation(DataConfig(), 8) == {}
    single = validation(DataConfig(validation=pairs[0]), 3)["first"]
    assert [single.sample(i).tolist()[:2] for i in range(len(single))] == [[0, 1], [4, 5], [8, 9]]
    blended = validation(DataConfig(validation=((0.75, pairs[0]), (0.25, pairs[1]))), 8)
    assert {name: firsts(one) for name, one in blended.items()} == {
        "first": [0, 4, 8, 12, 16, 20],
        "second": [500, 504],
    }
    alike = validation(DataConfig(validation=((None, pairs[0]), (None, pairs[1]))), 4)
    assert [len(one) for one in alike.values()] == [2, 2]
    uneven = validation(DataConfig(validation=((99.0, pairs[0]), (1.0, pairs[1]))), 1)
    assert [len(one) for one in uneven.values()] == [1, 1], "a source is never left out"
    assert len(validation(DataConfig(validation=pairs[1]), 1000)["second"]) == 8


def test_a_split_leaves_sequences_for_validation_and_test(make_pair: MakePair) -> None:
    prefix = make_pair([range(10 * i, 10 * i + 10) for i in range(20)], name="many")
    config = DataConfig(train=prefix, split="80,10,10")
    held_out = validation(config, 100)["many"]
    assert firsts(held_out) == [160, 164, 168, 172, 176]
    dataset = train(config, samples=40)
    assert isinstance(dataset, MegatronOrderDataset)
    whole = megatron_order(np.full(16, 10, np.int32), sequence_length=4, samples=40, seed=config.seed)
    assert dataset.order.document_index.tolist() == whole.document_index.tolist()
    assert max(int(dataset.sample(i).max()) for i in range(len(dataset))) == 159
    stable = train(dataclasses.replace(config, order="stable"))
    assert isinstance(stable, StableOrderDataset) and stable.windows_per_epoch == 159 // 4
    assert open_training_sources(config).describe() == [{"weight": 1.0, "sequences": 16, "tokens": 160}]


def test_a_split_that_leaves_nothing_says_so(pairs: tuple[str, str]) -> None:
    with pytest.raises(DataError, match=r"data.split=969,30,1 leaves no pair of data.train two tokens for validation"):
        validation(DataConfig(train=pairs[0], split="969,30,1"), 8)
    with pytest.raises(DataError, match=r"holds 0 tokens in the part of data.split"):
        train(DataConfig(train=pairs[0], split="0,1,0"))


@pytest.mark.parametrize(("temperature", "second"), [(1.0, 33), (2.0, 33**0.5), (1000.0, 1.0)])
def test_a_list_of_prefixes_is_weighed_by_size(pairs: tuple[str, str], temperature: float, second: float) -> None:
    config = DataConfig(train=((None, pairs[0]), (None, pairs[1])), temperature=temperature, order="stable")
    ((_, blend),) = open_training_sources(config).blends
    first = 85 ** (1 / temperature)
    assert blend[1][0] / blend[0][0] == pytest.approx(second / first, rel=1e-2)
    drawn = train(config)
    assert isinstance(drawn, Blend)
    assert drawn.given(10_000)[1] == pytest.approx(10_000 * second / (first + second), rel=1e-2)


def stages(pairs: tuple[str, str]) -> tuple[BlendFrom, ...]:
    return (
        BlendFrom(0, ((1.0, pairs[0]),)),
        BlendFrom(80, ((1.0, pairs[0]), (3.0, pairs[1]))),
        BlendFrom(202, ((1.0, pairs[1]),)),
    )


@pytest.mark.parametrize("order", ["megatron", "stable"])
def test_blends_follow_each_other_at_a_number_of_tokens(pairs: tuple[str, str], order: str) -> None:
    dataset = train(DataConfig(train=stages(pairs), order=order), samples=60)
    from_second = [int(dataset.sample(i)[0]) >= 500 for i in range(60)]
    assert not any(from_second[:20]) and all(from_second[51:])
    assert sum(from_second[20:51]) == 23
    assert isinstance(dataset, Blend)
    assert dataset.given(60) == [28, 32]
    assert [(account.samples, account.tokens) for account in ledger(dataset, 60)] == [(28, 112), (32, 128)]
    if order == "stable":
        whole = [dataset.sample(i).tolist() for i in range(60)]
        alone = [
            [part.sample(i).tolist() for i in range(60)]
            for part in (train(DataConfig(train=prefix, order=order)) for prefix in pairs)
        ]
        assert [row for row in whole if row[0] < 500] == alone[0][:28], "a source goes on where it was"
        assert [row for row in whole if row[0] >= 500] == alone[1][:32]


def test_megatron_members_of_following_blends_are_built_for_what_they_are_asked_for(pairs: tuple[str, str]) -> None:
    dataset = train(DataConfig(train=stages(pairs)), samples=60)
    assert isinstance(dataset, Blend)
    # 20 alone; 31 positions of which 8 and 24 with the surplus; 9 alone
    expected = [20 + math.ceil(31 * 0.25 * 1.005), math.ceil(31 * 0.75 * 1.005) + 9]
    for part, prefix, samples in zip(dataset.parts, pairs, expected, strict=True):
        alone = MegatronOrderDataset(stream(prefix), sequence_length=4, samples=samples, seed=1234)
        assert isinstance(part, MegatronOrderDataset)
        assert part.order.shuffle_index.tolist() == alone.order.shuffle_index.tolist()


def test_a_ledger_counts_epochs_of_what_is_predicted(pairs: tuple[str, str]) -> None:
    for order in ("megatron", "stable"):
        dataset = train(DataConfig(train=pairs[0], order=order))
        (account,) = ledger(dataset, 42)
        per_epoch = 85 / 4 if order == "megatron" else 21
        assert (account.prefix, account.samples, account.tokens) == (pairs[0], 42, 168)
        assert account.epochs == pytest.approx(42 / per_epoch)
    assert ledger(train(DataConfig(train="synthetic")), 42) == []


def test_names_of_sources_are_as_short_as_tells_them_apart() -> None:
    assert source_names(["/a/b/text", "/a/c/code"]) == ["text", "code"]
    assert source_names(["/a/b/text", "/a/c/text", "x"]) == ["b/text", "c/text", "x"]
    assert source_names(["text"]) == ["text"]


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
