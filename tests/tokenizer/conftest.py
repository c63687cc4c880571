"""The same small vocabulary in both libraries' formats."""

from __future__ import annotations

import io
import itertools
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import Regex, decoders, models, normalizers, pre_tokenizers, trainers

LLAMA_3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|"
    r"\s*[\r\n]+|\s+(?!\S)|\s+"
)
SENTENCE = "the patient was given aspirin for pain and fever after a day of rest in the ward with no sign of harm"


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    """A SentencePiece BPE of a few hundred pieces, with Llama's special ids and byte fallback."""
    return train_sentencepiece()


def train_sentencepiece(**options: object) -> bytes:
    """A small SentencePiece model, Llama's kind unless the options say otherwise."""
    words = SENTENCE.split()
    lines = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(9)) for i in range(200)]
    content = io.BytesIO()
    llama = {
        "model_type": "bpe",
        "vocab_size": 340,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "minloglevel": 2,
    }
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(lines), model_writer=content, **llama | options)
    return content.getvalue()


@pytest.fixture(scope="session")
def llama_3_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A byte-level BPE as Llama-3's: words split by its pattern, whole words looked up first, special tokens after."""
    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(LLAMA_3_WORDS), behavior="isolated", invert=False),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    words = [*SENTENCE.split(), "don't", "12345", "日本語", "naïve", "==", "\n\n", "\t\t", "    "]
    lines = [" ".join(pair) for pair in itertools.product(words, repeat=2)]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(lines, trainer)
    tokenizer.add_special_tokens(["<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"])
    folder = tmp_path_factory.mktemp("llama-3")
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"bos_token": "<|begin_of_text|>", "eos_token": "<|end_of_text|>"})
    )
    return folder


@pytest.fixture(scope="session")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory, llama_3_folder: Path) -> Path:
    """GPT-2's two files, as Megatron's users have them."""
    model = json.loads((llama_3_folder / "tokenizer.json").read_text())["model"]
    vocabulary = model["vocab"] | {"<|endoftext|>": len(model["vocab"])}
    folder = tmp_path_factory.mktemp("gpt2")
    (folder / "gpt2-vocab.json").write_text(json.dumps(vocabulary))
    merges = [" ".join(pair) for pair in model["merges"]]
    (folder / "gpt2-merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
    return folder


@pytest.fixture
def model_folder(tmp_path: Path, model_bytes: bytes) -> Path:
    """A folder with a `tokenizer.model` only."""
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.model").write_bytes(model_bytes)
    return folder


@pytest.fixture
def json_folder(tmp_path: Path, model_bytes: bytes) -> Path:
    """A folder with the same vocabulary as a `tokenizer.json`, written as Llama-2's is, and its configuration."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model_bytes)
    pieces = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    # SentencePiece joins the pair whose result has the smallest id first.
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(pieces, key=lambda piece: pieces[piece])
        for cut in range(1, len(piece))
        if pieces[piece] >= 259 and piece[:cut] in pieces and piece[cut:] in pieces
    ]
    tokenizer = tokenizers.Tokenizer(
        models.BPE(vocab=pieces, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens(["<unk>", "<s>", "</s>"])
    folder = tmp_path / "json"
    folder.mkdir()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": {"content": "</s>"}}))
    return folder
