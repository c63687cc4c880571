"""Both kinds of tokenizer: SentencePiece's own ids, added and literal tokens, fingerprints, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron.data.indexed import IndexedReader
from megatron.tokenizer import Tokenizer, find_tokenizer, load_tokenizer, read_extra_tokens
from megatron.utils.errors import ConfigError, DataError

TEXTS = [
    "the patient was given aspirin",
    "",
    " ",
    "   spaces   run  ",
    "\n",
    "line\n\nline\ttab\r\n",
    "▁",
    "日本語 µg ≥ 5 % é 🩺",
    "a\x00b",
    "</s><s> <unk>",
]


def both(model_folder: Path, json_folder: Path, *extra: str) -> tuple[Tokenizer, Tokenizer]:
    return load_tokenizer(model_folder, extra), load_tokenizer(json_folder, extra)


@pytest.mark.parametrize("text", TEXTS)
def test_both_libraries_give_sentencepieces_ids(
    model_folder: Path, json_folder: Path, model_bytes: bytes, text: str
) -> None:
    expected = sentencepiece.SentencePieceProcessor(model_proto=model_bytes).encode(text)
    for tokenizer in both(model_folder, json_folder):
        assert tokenizer.encode(text) == expected
        assert not {1, 2} & set(expected)


@given(text=st.text(st.one_of(st.characters(codec="utf-8"), st.sampled_from(" ▁\nathepin")), max_size=30))
@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_text_survives_there_and_back(model_folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(model_folder, ["<x>"])
    plain = text.replace("▁", "_").replace("\x00", "")  # SentencePiece's own marks
    assert tokenizer.decode(tokenizer.encode(plain)) == plain
    tokens, sizes = tokenizer.encode_batch([plain, plain])
    assert tokens.tolist() == tokenizer.encode(plain) * 2
    assert sizes.tolist() == [len(tokenizer.encode(plain))] * 2


def test_what_both_say_of_themselves(model_folder: Path, json_folder: Path) -> None:
    for tokenizer in both(model_folder, json_folder):
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (340, 2)
        assert tokenizer.token_id("</s>") == 2
        assert tokenizer.token_id("<0x0A>") == 13
        assert tokenizer.token_id("never seen") is None
        assert tokenizer.added_tokens == []


def test_a_folder_with_both_uses_the_model(model_folder: Path, json_folder: Path) -> None:
    shutil.copy(model_folder / "tokenizer.model", json_folder)
    assert find_tokenizer(json_folder) == json_folder / "tokenizer.model"
    assert [path.name for path in load_tokenizer(json_folder).files] == [
        "tokenizer.model",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert find_tokenizer(json_folder.parent) is None


def test_added_tokens_follow_the_pieces_and_stand_alone_in_text(
    model_folder: Path, json_folder: Path, model_bytes: bytes
) -> None:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    for tokenizer in both(model_folder, json_folder, "<a>", "<b c>", "</s>"):
        assert tokenizer.vocab_size == 342  # </s> is a piece already, and keeps its id
        assert tokenizer.added_tokens == ["<a>", "<b c>"]
        assert (tokenizer.token_id("<a>"), tokenizer.token_id("<b c>")) == (340, 341)
        expected = [340, *processor.encode("pain "), 341, 340, *processor.encode("\n"), 2, *processor.encode("<s>")]
        assert tokenizer.encode("<a>pain <b c><a>\n</s><s>") == expected
        assert tokenizer.decode(tokenizer.encode("rest <a>in <b c>")) == "rest <a>in <b c>"


def test_of_two_tokens_at_one_place_the_first_named_wins(model_folder: Path) -> None:
    assert load_tokenizer(model_folder, ["<a", "<a>"]).encode("<a>")[0] == 340
    assert load_tokenizer(model_folder, ["<a>", "<a"]).encode("<a>") == [340]
    assert load_tokenizer(model_folder, ["a.c"]).encode("abc") == load_tokenizer(model_folder).encode("abc")


def test_added_tokens_of_a_hugging_face_folder_keep_their_ids(model_folder: Path) -> None:
    (model_folder / "added_tokens.json").write_text(json.dumps({"<CLS>": 340, "<EOD>": 341, "<bos>": 343}))
    decoder = {"1": {"content": "<s>"}, "2": {"content": "</s>"}, "342": {"content": "<|im_end|>"}}
    (model_folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<bos>", "added_tokens_decoder": decoder})
    )
    tokenizer = load_tokenizer(model_folder, ["<x>"])
    assert tokenizer.added_tokens == ["<CLS>", "<EOD>", "<|im_end|>", "<bos>", "<x>"]
    assert tokenizer.encode("<x><EOD><|im_end|><CLS>") == [344, 341, 342, 340]
    assert not {2, 343} & set(tokenizer.encode("</s><bos>"))  # a text can neither begin nor end itself
    assert load_tokenizer(model_folder / "tokenizer.model", ["<x>"]).fingerprint == tokenizer.fingerprint


def test_special_tokens_past_a_json_vocabulary_are_literal_but_not_the_sentence_ends(json_folder: Path) -> None:
    path = json_folder / "tokenizer.json"
    library = tokenizers.Tokenizer.from_file(str(path))
    library.add_special_tokens(["<|turn|>", "<|end|>"])
    library.save(str(path))
    (json_folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|end|>"}))
    tokenizer = load_tokenizer(json_folder)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (342, 341)
    assert tokenizer.encode("<|turn|>") == [340]
    assert 341 not in tokenizer.encode("pain <|end|>")
    assert not {0, 1, 2} & set(tokenizer.encode("<unk><s></s>"))


def test_truncation_and_padding_stored_in_a_tokenizer_json_do_not_apply(json_folder: Path) -> None:
    path = json_folder / "tokenizer.json"
    plain = load_tokenizer(json_folder).encode("the patient was given aspirin")
    library = tokenizers.Tokenizer.from_file(str(path))
    library.enable_truncation(3)
    library.enable_padding(length=50)
    library.save(str(path))
    assert load_tokenizer(json_folder).encode("the patient was given aspirin") == plain
    assert 3 < len(plain) < 50


def test_without_a_named_end_of_sentence_there_is_none(json_folder: Path) -> None:
    (json_folder / "tokenizer_config.json").unlink()
    assert load_tokenizer(json_folder).eos_id is None
    (json_folder / "special_tokens_map.json").write_text(json.dumps({"eos_token": {"content": "</s>"}}))
    assert load_tokenizer(json_folder).eos_id == 2


def test_the_fingerprint_is_of_the_ids_meaning_alone(model_folder: Path, json_folder: Path, tmp_path: Path) -> None:
    model, converted = both(model_folder, json_folder)
    renamed = tmp_path / "elsewhere.model"
    shutil.copy(model_folder / "tokenizer.model", renamed)
    assert load_tokenizer(renamed).fingerprint == model.fingerprint == converted.fingerprint
    path = json_folder / "tokenizer.json"
    path.write_text(json.dumps(json.loads(path.read_text()), indent=8))
    assert load_tokenizer(json_folder).fingerprint == model.fingerprint
    different = [
        model.fingerprint,
        load_tokenizer(model_folder, ["<a>"]).fingerprint,
        load_tokenizer(model_folder, ["<b>"]).fingerprint,
        load_tokenizer(model_folder, ["<a>", "<b>"]).fingerprint,
        load_tokenizer(model_folder, ["<b>", "<a>"]).fingerprint,
    ]
    assert len(set(different)) == 5
    swapped = json.loads(path.read_text())
    vocabulary = swapped["model"]["vocab"]
    vocabulary["▁the"], vocabulary["▁a"] = vocabulary["▁a"], vocabulary["▁the"]
    path.write_text(json.dumps(swapped))
    assert load_tokenizer(json_folder).fingerprint != model.fingerprint


def test_fingerprints_never_change(shared: Path) -> None:
    """Pinned: data made by an earlier release must still be recognised."""
    folder = shared / "data/stories260K-untied"
    assert load_tokenizer(folder).fingerprint == PINNED
    assert load_tokenizer(shared / "data/stories260K/tok512.model").fingerprint == PINNED
    assert load_tokenizer(folder, ["<x>"]).fingerprint == PINNED_WITH_EXTRA


PINNED = "0dded7d09355a5cfaac17bd840fffc3ad7262d017c386e9a8cd3f7f4790e3987"
PINNED_WITH_EXTRA = "12919215c01618590be198d9c723712ed45c1d5286572f88979ce5a42a67ce5e"


def test_a_real_vocabulary_of_32_000_pieces(shared: Path) -> None:
    """Llama-2's layout: every piece after a special token starts with SentencePiece's space mark."""
    tokenizer = load_tokenizer(shared / "data/tokenizers/mistral_v1_tokenizer.model", ["<|im_start|>", "<|im_end|>"])
    piece = tokenizer.token_id
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (32_002, 2)
    assert tokenizer.encode("<|im_start|>answer\nC<|im_end|>\n") == [
        32_000, piece("▁answer"), piece("<0x0A>"), piece("C"), 32_001, piece("▁"), piece("<0x0A>"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("tokenizer.model", b"", "is not a SentencePiece model"),
        ("tokenizer.model", b"\x00\x01 damaged", "is not a SentencePiece model"),
        ("tokenizer.json", b'{"model": 1}', "is not a tokenizer.json"),
        ("tokenizer.json", b"{", "is not a tokenizer.json"),
    ],
)
def test_a_damaged_file_is_named(tmp_path: Path, name: str, content: bytes, said: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} {said}"):
        load_tokenizer(tmp_path)


def test_damaged_files_beside_it_are_named(model_folder: Path) -> None:
    for name, content in (
        ("added_tokens.json", '{"<a>": "x"}'),
        ("added_tokens.json", "["),
        ("tokenizer_config.json", "3"),
        ("tokenizer_config.json", '{"added_tokens_decoder": 3}'),
    ):
        (model_folder / name).write_text(content)
        with pytest.raises(DataError, match=name):
            load_tokenizer(model_folder)
        (model_folder / name).unlink()


def test_missing_tokenizers_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no tokenizer at .*gone"):
        load_tokenizer(tmp_path / "gone")
    with pytest.raises(DataError, match=r"holds neither tokenizer.model nor tokenizer.json"):
        load_tokenizer(tmp_path)


def test_extra_tokens_come_from_a_list_or_a_file(tmp_path: Path) -> None:
    assert read_extra_tokens("<a>,b c, d") == ["<a>", "b c", " d"]
    (tmp_path / "tokens.txt").write_text("<a>\n'quoted'\nwith,comma\n\n", encoding="utf-8")
    assert read_extra_tokens(str(tmp_path / "tokens.txt")) == ["<a>", "'quoted'", "with,comma"]


@pytest.mark.parametrize("argument", ["'<a>,<b>'", '"<a>,<b>"', "“<a>,<b>”", "'<a>'"])
def test_quotes_that_the_shell_left_are_refused(argument: str) -> None:
    with pytest.raises(ConfigError, match="quotes within its tokens"):
        read_extra_tokens(argument)


@pytest.mark.parametrize(
    ("tokens", "said"), [(["<a>", ""], "empty token"), (["<a>", "<b>", "<a>"], "<a> more than once")]
)
def test_unusable_extra_tokens_are_refused(model_folder: Path, tokens: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        load_tokenizer(model_folder, tokens)


def test_a_byte_level_tokenizer_json_gives_a_real_corpus_its_ids_back(shared: Path, tmp_path: Path) -> None:
    """GPT-2 style, with the vocabulary that made the real pair: decoding a document and encoding it is the identity."""
    folder = shared / "data/megatron"
    merges = [tuple(line.split()) for line in (folder / "gpt2-tiny-merges.txt").read_text().splitlines()[1:]]
    vocabulary = json.loads((folder / "gpt2-tiny-vocab.json").read_text())
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=vocabulary, merges=merges))
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    library.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<|endoftext|>"}))
    tokenizer = load_tokenizer(tmp_path)
    assert (tokenizer.vocab_size, tokenizer.eos_id) == (5000, 4999)
    reader = IndexedReader(folder / "meg-gpt2-openwebtext_text_document")
    for number in range(0, 1000, 10):
        ids = reader.read(number).tolist()
        assert ids.pop() == tokenizer.eos_id
        assert tokenizer.encode(tokenizer.decode(ids)) == ids
    assert 4999 not in tokenizer.encode("the end <|endoftext|>")
