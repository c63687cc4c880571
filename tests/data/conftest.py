"""Small pairs of files and a small tokenizer, made on the spot."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import sentencepiece

from megatron.data.indexed import IndexedWriter

MakePair = Callable[..., str]


@pytest.fixture
def make_pair(tmp_path: Path) -> MakePair:
    """Write documents of one sequence each and give the prefix."""

    def make(documents: Sequence[Sequence[int]], name: str = "corpus_text_document", dtype: str = "<u2") -> str:
        prefix = str(tmp_path / name)
        with IndexedWriter(prefix, dtype) as writer:
            for document in documents:
                writer.add_sequence(document)
                writer.end_document()
        return prefix

    return make


@pytest.fixture(scope="session")
def tiny_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A SentencePiece BPE of a few hundred pieces, with Llama's special ids and byte fallback."""
    text = "the patient was given aspirin for pain and fever after a day of rest in the ward with no sign of harm"
    words = text.split()
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
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.model"
    path.write_bytes(content.getvalue())
    return path
