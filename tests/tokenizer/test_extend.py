"""Tokens added to each kind of tokenizer folder: the same ids by every library that reads the files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import tokenizers
from transformers import AutoTokenizer

from megatron.tokenizer import load_tokenizer
from megatron.tokenizer.extend import extend_tokenizer
from megatron.utils.errors import ConfigError, DataError

TOKENS = ["<CLS>", "two words", "<é>", "<EOD>"]
TEXT = "the patient<EOD>two words was <CLS> given<é>"


def extend(folder: Path, tokens: list[str] = TOKENS) -> dict[str, int | None]:
    """Add tokens to a folder in place; the ids that we read from it afterwards."""
    _, after, files = extend_tokenizer(folder, tokens)
    for name, content in files.items():
        (folder / name).write_bytes(content)
    found = load_tokenizer(folder)
    assert found.fingerprint == after.fingerprint
    assert found.encode(TEXT) == after.encode(TEXT)
    return {token: found.token_id(token) for token in tokens}


def ids_of_transformers(folder: Path, model_type: str, tokens: list[str] = TOKENS) -> dict[str, int]:
    """What AutoTokenizer makes of the folder beside a `config.json`; each token must come out of a text whole."""
    (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    assert all(found[token] in ids for token in tokens if token in TEXT)
    assert len(tokenizer) == max(found.values()) + 1
    return found


@pytest.mark.parametrize("settings", [None, {"bos_token": "<s>", "eos_token": "</s>"}])
def test_sentencepiece(tmp_path: Path, model_bytes: bytes, settings: dict | None) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    if settings is not None:
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    expected = {token: 340 + at for at, token in enumerate(TOKENS)}
    assert extend(tmp_path) == expected == ids_of_transformers(tmp_path, "llama")
    assert extend(tmp_path, ["<B>", "<CLS>"]) == {"<B>": 344, "<CLS>": 340}
    assert ids_of_transformers(tmp_path, "llama", [*TOKENS, "<B>"]) == {**expected, "<B>": 344}
    if settings is not None:
        written = json.loads((tmp_path / "tokenizer_config.json").read_text())
        assert settings.items() <= written.items() and len(written["added_tokens_decoder"]) == 5


def test_tokenizer_json(tmp_path: Path, llama_3_folder: Path) -> None:
    folder = shutil.copytree(llama_3_folder, tmp_path / "llama-3")
    size = load_tokenizer(folder).vocab_size
    before = load_tokenizer(folder).encode("the patient was given")
    expected = {token: size + at for at, token in enumerate(TOKENS)}
    assert extend(folder) == expected == ids_of_transformers(folder, "llama")
    assert load_tokenizer(folder).encode("the patient was given") == before
    own = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    assert {token: own.token_to_id(token) for token in TOKENS} == expected
    assert not (folder / "added_tokens.json").exists()


def test_gpt2s_two_files_become_a_tokenizer_json(tmp_path: Path, gpt2_folder: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        shutil.copy(gpt2_folder / f"gpt2-{name}", folder / name)
    plain = load_tokenizer(folder)
    expected = {token: plain.vocab_size + at for at, token in enumerate(TOKENS)}
    assert extend(folder) == expected == ids_of_transformers(folder, "gpt2")
    found = load_tokenizer(folder)
    assert found.eos_id == plain.eos_id is not None
    assert found.encode("the patient <|endoftext|>") == plain.encode("the patient <|endoftext|>")


def test_both_files_learn_of_the_tokens_or_none(tmp_path: Path, model_bytes: bytes, llama_3_folder: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(model_bytes)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "both")
    (tmp_path / "both" / "tokenizer.model").write_bytes(model_bytes)
    assert (tmp_path / "both" / "tokenizer.json").is_file()
    expected = {token: 340 + at for at, token in enumerate(TOKENS)}
    assert extend(tmp_path / "both") == expected == ids_of_transformers(tmp_path / "both", "llama")
    assert load_tokenizer(tmp_path / "both" / "tokenizer.json").token_id("<EOD>") == 343
    shutil.copy(llama_3_folder / "tokenizer.json", tmp_path)
    with pytest.raises(DataError, match="do not agree with each other"):
        extend_tokenizer(tmp_path, TOKENS)


def test_a_folder_without_a_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"copy its tokenizer\.model"):
        extend_tokenizer(tmp_path, TOKENS)
