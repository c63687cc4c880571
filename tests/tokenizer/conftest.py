"""The same small vocabulary in both libraries' formats."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, normalizers

SENTENCE = "the patient was given aspirin for pain and fever after a day of rest in the ward with no sign of harm"


@pytest.fixture(scope="session")
def model_bytes() -> bytes:
    """A SentencePiece BPE of a few hundred pieces, with Llama's special ids and byte fallback."""
    words = SENTENCE.split()
    lines = [" ".join(words[(7 * i + j * j) % len(words)] for j in range(9)) for i in range(200)]
    content = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=content,
        model_type="bpe",
        vocab_size=340,
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    return content.getvalue()


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
