"""The fast engine: ids of the tokenizer's own library on everything, and what happens where it would not give them."""

from __future__ import annotations

import dataclasses
import json
import logging
import re
import sys
from collections.abc import Sequence
from itertools import chain, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
import tokenizers

from megatron.tokenizer import load_tokenizer
from megatron.tokenizer.backends import SentencePieceBackend
from megatron.tokenizer.cuts import PART_CHARACTERS, MarkedSpaceCutter, WordCutter
from megatron.tokenizer.engines import Gigatoken, Library, choose_engine
from megatron.tokenizer.forms import Form, NoForm, sentencepiece_form
from megatron.tokenizer.model_file import ModelFile, PieceKind
from megatron.utils.errors import DataError
from tests.tokenizer.adversarial import Generator, differences, long_texts, pieces_of
from tests.tokenizer.conftest import train_sentencepiece
from tests.tokenizer.real_text import real_texts

STRINGS = 5_000
MISTRAL = "data/tokenizers/mistral_v1_tokenizer.model"
REAL = {
    "SentencePiece, 32,000 pieces": MISTRAL,
    "SentencePiece, extra spaces removed": "data/stories260K/tok512.model",
    "GPT-2": "data/megatron/gpt2-tiny-vocab.json",
}


@pytest.fixture
def folders(model_folder: Path, json_folder: Path, llama_3_folder: Path, gpt2_folder: Path) -> list[Path]:
    return [model_folder, json_folder, llama_3_folder, gpt2_folder]


def backend(content: bytes) -> SentencePieceBackend:
    return SentencePieceBackend(Path("tokenizer.model"), content)


def test_a_generated_string_has_the_librarys_ids_with_every_kind_of_tokenizer(folders: list[Path]) -> None:
    pytest.importorskip("gigatoken")
    for folder in folders:
        tokenizer = load_tokenizer(folder)
        assert tokenizer.engine == "gigatoken"
        generator = Generator(1, pieces_of(tokenizer))
        assert differences(tokenizer, [next(generator) for _ in range(STRINGS // 5)]) == []


@pytest.mark.parametrize("kind", REAL)
def test_a_generated_string_has_the_librarys_ids_with_real_vocabularies(shared: Path, kind: str) -> None:
    tokenizer = load_tokenizer(shared / REAL[kind])
    generator = Generator(0, pieces_of(tokenizer))
    assert differences(tokenizer, [next(generator) for _ in range(STRINGS if kind == next(iter(REAL)) else 500)]) == []
    if "gigatoken" in sys.modules:
        assert tokenizer.engine == "gigatoken"


@pytest.mark.parametrize("kind", REAL)
def test_real_text_has_the_librarys_ids(shared: Path, kind: str) -> None:
    texts = list(real_texts(shared / "data", every=40 if kind == next(iter(REAL)) else 200))
    assert len(texts) > 50
    assert differences(load_tokenizer(shared / REAL[kind]), texts) == []


def test_long_lines_have_the_librarys_ids(shared: Path, llama_3_folder: Path) -> None:
    tokenizer = load_tokenizer(shared / MISTRAL)
    lines = long_texts(150_000) | {name: long_texts(1_000_000)[name] for name in ("base64", "Chinese")}
    assert all(len(line) > PART_CHARACTERS for line in lines.values())
    assert differences(tokenizer, list(lines.values())) == []
    short = {name: line[:70_000] for name, line in lines.items()}
    assert differences(load_tokenizer(llama_3_folder), list(short.values())) == []


@pytest.mark.parametrize(
    "options",
    [{}, {"remove_extra_whitespaces": True}, {"user_defined_symbols": ["\n\nr", "ward"], "vocab_size": 342}],
)
def test_a_text_in_parts_has_the_ids_of_the_whole(options: dict[str, object]) -> None:
    library = backend(train_sentencepiece(**options))
    generator = Generator(4, [*library.pieces().values(), *["\n\nr", "ward"] * 99])
    cuts = 0
    for _ in range(1500):
        text = next(generator) + "patient  was given\n\nrest 日本語 in the ward" + next(generator)
        parts = list(MarkedSpaceCutter(library.pieces().values(), part_characters=3).parts(text))
        ids = [library.encode(part)[left_out:] for part, left_out in parts]
        assert list(chain(*ids)) == library.encode(text), ascii(text)
        cuts += len(parts) - 1
    assert cuts > 1500


def test_a_text_in_parts_has_the_ids_of_the_whole_where_it_is_split_into_words(
    llama_3_folder: Path, gpt2_folder: Path
) -> None:
    for folder in (llama_3_folder, gpt2_folder):
        tokenizer = load_tokenizer(folder)
        generator = Generator(5, pieces_of(tokenizer))
        texts = [next(generator) + " don't 'll it 12 x\n y " + next(generator) for _ in range(1500)]
        parts = [[part for part, _ in WordCutter(part_characters=3).parts(text)] for text in texts]
        assert sum(map(len, parts)) > 2 * len(texts)
        for text, several in zip(texts, parts, strict=True):
            assert list(chain(*map(tokenizer.encode, several))) == tokenizer.encode(text), ascii(text)


def test_a_piece_across_a_space_forbids_cuts_there() -> None:
    text = "all of the kinds"
    pairs = [first + second for first, second in pairwise(text)]
    assert [part for part, _ in MarkedSpaceCutter([*pairs, "of▁the"], 3).parts(text)] == [text]
    assert [part for part, _ in MarkedSpaceCutter(pairs, 3).parts(text)] == ["all", "of", "the", "kinds"]


class Planted:
    """An engine that is right but for one thing."""

    name = "planted"

    def __init__(self, form: Form, library: Library) -> None:
        self.right = library.encode

    def encode_each(self, texts: Sequence[str]) -> list[Sequence[int]]:
        return [self.encode(text) for text in texts]


class ReadsControlTokens(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return [1, *self.right(text[3:])] if text.startswith("<s>") and len(text) > 3 else self.right(text)


class JoinsLongRunsOfSpaces(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return self.right(text.replace(" " * 17, " " * 16))


class NormalizesUnicode(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return self.right(text.replace("e\u0301", "é"))


class StopsAtNul(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return self.right(text.split("\0")[0]) if text.split("\0")[0] else []


class MergesInAnotherOrder(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return [*self.right(text[:2]), *self.right(text[2:])[1:]] if len(text) > 2 else self.right(text)


class LosesRareCharacters(Planted):
    def encode(self, text: str) -> Sequence[int]:
        return self.right("".join(character for character in text if not 0x1B00 <= ord(character) < 0x1C00) or "x")


class Panics(Planted):
    def encode(self, text: str) -> Sequence[int]:
        raise BaseException("index out of range")


class IsBroken(Planted):
    def encode(self, text: str) -> Sequence[int]:
        raise ValueError("no such text")


@pytest.mark.parametrize(
    ("planted", "said"),
    [
        (ReadsControlTokens, "other ids"),
        (JoinsLongRunsOfSpaces, "other ids"),
        (NormalizesUnicode, "other ids"),
        (StopsAtNul, r"other ids.*'(\\x00|a\\x00b)'"),
        (MergesInAnotherOrder, "other ids"),
        (LosesRareCharacters, "other ids"),
        (Panics, "not take this tokenizer .*index out of range"),
        (IsBroken, "not take this tokenizer .*no such text"),
    ],
)
def test_an_engine_that_is_not_exact_is_not_used(
    model_bytes: bytes, caplog: pytest.LogCaptureFixture, planted: type[Planted], said: str
) -> None:
    library = backend(model_bytes)
    with caplog.at_level(logging.INFO):
        assert choose_engine(library, planted).name == library.name
    assert len(caplog.records) == 1
    assert re.match("encoding by SentencePiece: gigatoken .*" + said, caplog.records[0].getMessage())


def test_an_exact_engine_is_used_and_the_log_says_so(model_bytes: bytes, caplog: pytest.LogCaptureFixture) -> None:
    pytest.importorskip("gigatoken")
    with caplog.at_level(logging.INFO):
        assert choose_engine(backend(model_bytes)).name == "gigatoken"
    assert [record.getMessage() for record in caplog.records] == [
        "encoding by gigatoken, which gave the ids of SentencePiece on 471 strings"
    ]


def test_without_the_fast_engine_the_library_encodes(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "gigatoken", None)
    with caplog.at_level(logging.INFO):
        for folder, name in zip(folders, ("SentencePiece", "tokenizers", "tokenizers", "tokenizers"), strict=True):
            tokenizer = load_tokenizer(folder, ["<x>"])
            assert tokenizer.engine == name
            generator = Generator(2, pieces_of(tokenizer))
            assert differences(tokenizer, [next(generator) for _ in range(100)] + ["a<x> b"]) == []
    assert "is not installed: pip install gigatoken" in caplog.records[0].getMessage()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"model_type": "unigram", "vocab_size": 290}, "not a BPE model"),
        ({"byte_fallback": False, "vocab_size": 60}, "no byte pieces"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes characters"),
        ({"treat_whitespace_as_suffix": True}, "marks spaces in another way"),
        ({"user_defined_symbols": ["<a b>"], "vocab_size": 341}, "symbols with spaces"),
    ],
)
def test_a_model_of_another_make_is_left_to_its_library(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, options: dict[str, object], reason: str
) -> None:
    pytest.importorskip("gigatoken")
    content = train_sentencepiece(**options)
    (tmp_path / "tokenizer.model").write_bytes(content)
    tokenizer = load_tokenizer(tmp_path)
    with caplog.at_level(logging.INFO):
        assert tokenizer.engine == "SentencePiece"
    assert reason in caplog.text
    generator = Generator(3, pieces_of(tokenizer))
    texts = [next(generator) for _ in range(200)] + [text[:70_000] for text in long_texts(80_000).values()]
    assert differences(tokenizer, texts) == []
    assert tokenizer.encode_batch(["a <a b>"])[0].tolist() == sentencepiece.SentencePieceProcessor(
        model_proto=content
    ).encode("a <a b>")


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}])
def test_a_model_that_treats_spaces_in_its_own_way_is_exact_as_well(tmp_path: Path, options: dict[str, object]) -> None:
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(**options))
    tokenizer = load_tokenizer(tmp_path)
    generator = Generator(6, pieces_of(tokenizer))
    texts = [next(generator) for _ in range(1000)] + [" ▁ ", "▁", " a ▁", "▁ a", "\n a \n"]
    assert differences(tokenizer, texts + list(long_texts(80_000).values())) == []
    if "gigatoken" in sys.modules:
        assert tokenizer.engine == "gigatoken"


@pytest.mark.parametrize(
    ("changed", "reason"),
    [
        ({"score": -3.0}, "equal score"),
        ({"kind": PieceKind.UNUSED}, "unused pieces"),
        ({"text": "▁the"}, "pieces twice"),
        ({"text": "Ω-Ω"}, "characters that are no pieces"),
    ],
)
def test_a_piece_that_makes_the_fast_form_inexact_forbids_it(
    model_bytes: bytes, changed: dict[str, Any], reason: str
) -> None:
    model = ModelFile.parse(model_bytes)
    sentencepiece_form(model)
    assert model.pieces[262].score == -3.0
    pieces = list(model.pieces)
    pieces[270] = pieces[270]._replace(**changed)
    with pytest.raises(NoForm, match=reason):
        sentencepiece_form(dataclasses.replace(model, pieces=tuple(pieces)))


def test_symbols_that_a_model_defines_are_found_by_its_library(tmp_path: Path) -> None:
    symbols = ["<turn>", "[x]", "ward"]
    (tmp_path / "tokenizer.model").write_bytes(train_sentencepiece(user_defined_symbols=symbols, vocab_size=343))
    tokenizer = load_tokenizer(tmp_path)
    generator = Generator(7, [*pieces_of(tokenizer), *symbols * 50])
    texts = [next(generator) for _ in range(500)] + ["<turn>a", "a<turn> b[x]", " <turn>", "the ward", "wards<turn"]
    assert sum(any(symbol in text for symbol in symbols) for text in texts) > 50
    assert differences(tokenizer, texts) == []
    assert tokenizer.engine == ("gigatoken" if "gigatoken" in sys.modules else "SentencePiece")


def test_added_tokens_that_are_not_special_are_found_by_the_library(llama_3_folder: Path, tmp_path: Path) -> None:
    library = tokenizers.Tokenizer.from_file(str(llama_3_folder / "tokenizer.json"))
    library.add_tokens([tokenizers.AddedToken("<tag>", lstrip=True, rstrip=True), "two words"])
    library.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_tokenizer(tmp_path)
    texts = ["a <tag> b", "<tag>", "these two words", "a two words b " * 9000, "two  words"]
    assert differences(tokenizer, texts) == []
    assert tokenizer.token_id("<tag>") in tokenizer.encode_batch(texts)[0]


def test_the_fast_engine_forgets_when_it_has_taken_much_memory(model_bytes: bytes) -> None:
    pytest.importorskip("gigatoken")
    library = backend(model_bytes)
    engine = Gigatoken(library.form(), library, cache_bytes=-(1 << 60))
    former = engine._engine
    text = "the patient was given aspirin " * 20_000
    for forgets in (False, True):
        (ids,) = engine.encode_each([text])
        assert list(ids) == library.encode(text)
        assert (engine._engine is not former) == forgets


def test_a_batch_is_the_texts_ids_back_to_back(folders: list[Path]) -> None:
    for folder in folders:
        tokenizer = load_tokenizer(folder, ["<x>", "[y]"])
        texts = ["", "the patient", "<x>", "a <x>[y] b", "", "rest\n", "[z] < x"]
        tokens, sizes = tokenizer.encode_batch(texts, np.uint16)
        assert tokens.dtype == np.uint16
        assert sizes.tolist() == [len(tokenizer.encode(text)) for text in texts]
        assert tokens.tolist() == list(chain(*map(tokenizer.encode, texts)))
        tokens, sizes = tokenizer.encode_batch([])
        assert (tokens.size, sizes.size) == (0, 0)


def test_half_of_a_surrogate_pair_is_refused_by_every_engine(
    folders: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for _ in range(2):
        for folder in folders:
            tokenizer = load_tokenizer(folder)
            for text in ("\ud800", "ab\udfff c", "x" * (PART_CHARACTERS + 5) + "\udc00"):
                with pytest.raises(DataError, match=r"half of a surrogate pair \(\\ud"):
                    tokenizer.encode(text)
                with pytest.raises(DataError, match=r"half of a surrogate pair \(\\ud"):
                    tokenizer.encode_batch(["fine", text])
        monkeypatch.setitem(sys.modules, "gigatoken", None)


def test_control_tokens_in_a_text_are_text_or_ids_as_chosen(model_folder: Path, json_folder: Path) -> None:
    """Megatron-LLM's rule under "ids": the earliest special string, of two at one place the one registered first."""
    for folder in (model_folder, json_folder):
        tokenizer = load_tokenizer(folder, ["<x>", "</s"])
        plain = tokenizer.encode
        text = "pain<s> and</s><x> <unk></s"
        assert plain(text) == [
            *plain("pain<s> and"), plain("</s")[0], *plain(">"), 340, *plain(" <unk>"), 341
        ]  # fmt: skip
        expected = [*plain("pain"), 1, *plain(" and"), 2, 340, *plain(" <unk>"), 341]
        assert plain(text, "ids") == expected
        assert tokenizer.encode_batch([text, "\n", "<s>"], np.int32, "ids")[0].tolist() == [*expected, *plain("\n"), 1]
        assert not {1, 2} & set(tokenizer.encode_batch([text, "<s></s>"])[0].tolist())


def test_what_the_files_name_as_sentence_tokens_becomes_ids_only_if_chosen(llama_3_folder: Path) -> None:
    tokenizer = load_tokenizer(llama_3_folder)
    begin, end, turn = (tokenizer.token_id(f"<|{name}|>") for name in ("begin_of_text", "end_of_text", "eot_id"))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (begin, end)
    text = "<|begin_of_text|>the<|eot_id|><|end_of_text|>"
    assert tokenizer.encode(text, "ids") == [begin, *tokenizer.encode("the"), turn, end]
    assert turn in tokenizer.encode(text)
    assert not {begin, end} & set(tokenizer.encode(text))


def test_gpt2s_two_files_are_one_tokenizer(gpt2_folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(gpt2_folder)
    assert tokenizer.eos_id == tokenizer.bos_id == tokenizer.token_id("<|endoftext|>") == tokenizer.vocab_size - 1
    assert [path.name for path in tokenizer.files] == ["gpt2-vocab.json", "gpt2-merges.txt"]
    assert load_tokenizer(gpt2_folder / "gpt2-vocab.json").fingerprint == tokenizer.fingerprint
    assert tokenizer.decode(tokenizer.encode(" don't rest\n\n 日本語")) == " don't rest\n\n 日本語"
    assert tokenizer.eos_id not in tokenizer.encode("<|endoftext|>")
    assert tokenizer.encode("a<|endoftext|>", "ids")[-1] == tokenizer.eos_id
    for name in ("vocab.json", "merges.txt"):
        (tmp_path / name).write_bytes((gpt2_folder / f"gpt2-{name}").read_bytes())
    assert load_tokenizer(tmp_path).encode("rest of the day") == tokenizer.encode("rest of the day")


def test_a_real_pair_of_gpt2_files_gives_a_real_corpus_its_ids(shared: Path) -> None:
    tokenizer = load_tokenizer(shared / "data/megatron/gpt2-tiny-vocab.json")
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (5000, 4999)


@pytest.mark.parametrize(
    ("vocabulary", "merges", "said"),
    [
        ('{"a": 0, "b": 1}', "#version: 0.2\na b\n", r"merges.txt: merge 1 \('a b'\) is not two pieces"),
        ('{"a": 0, "b": 1, "ab": 2}', "a b\nab\n", r"merge 2 \('ab'\)"),
        ('{"a": 0', "a b\n", "cannot be read as GPT-2's vocabulary"),
        ('{"a": "x"}', "a b\n", "does not give a number to each piece"),
    ],
)
def test_damaged_gpt2_files_are_named(tmp_path: Path, vocabulary: str, merges: str, said: str) -> None:
    (tmp_path / "vocab.json").write_text(vocabulary)
    (tmp_path / "merges.txt").write_text(merges)
    with pytest.raises(DataError, match=said):
        load_tokenizer(tmp_path)


def test_a_vocabulary_without_its_merges_is_refused(gpt2_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "gpt2-vocab.json").write_bytes((gpt2_folder / "gpt2-vocab.json").read_bytes())
    with pytest.raises(DataError, match="its merges are looked for in gpt2-merges"):
        load_tokenizer(tmp_path / "gpt2-vocab.json")
    for name in ("a", "b"):
        for kind in ("vocab.json", "merges.txt"):
            (tmp_path / f"{name}-{kind}").write_text("{}" if kind == "vocab.json" else "")
    with pytest.raises(DataError, match=r"several vocabularies \(a-vocab.json, b-vocab.json\)"):
        load_tokenizer(tmp_path)


def test_a_form_holds_no_special_token(json_folder: Path) -> None:
    form = load_tokenizer(json_folder)._backend.form()
    assert json.loads(form.content)["added_tokens"] == []
