"""Models and token streams: real ones from ../shared, and small ones made on the spot."""

from __future__ import annotations

import json
import re
import tarfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatron.data.indexed import IndexedWriter

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"


@dataclass(frozen=True)
class Material:
    """A Hugging Face folder and the prefix of a `.bin/.idx` pair for it."""

    model: Path
    data: Path


def make_stories(folder: Path) -> Material:
    """The trained stories260K on abstracts of PubMed records, tokenized with its own tokenizer."""
    from sentencepiece import SentencePieceProcessor

    model = SHARED / "data" / "stories260K-untied"
    tokenizer = SentencePieceProcessor(model_file=str(model / "tokenizer.model"))
    write_pair(folder / "pubmed", ([*tokenizer.encode(text), tokenizer.eos_id()] for text in pubmed_abstracts()))
    return Material(model, folder / "pubmed")


def make_random(folder: Path) -> Material:
    """A random Llama of transformers with a tied embedding, and the paragraphs of the licence in bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 259,
        "hidden_size": 48,
        "intermediate_size": 88,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 64,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.08,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**sizes)).save_pretrained(folder / "model")
    paragraphs = (ROOT / "LICENSE").read_bytes().split(b"\n\n")
    write_pair(folder / "licence", ([*paragraph, 258] for paragraph in paragraphs))
    return Material(folder / "model", folder / "licence")


def write_pair(prefix: Path, documents: Iterable[Sequence[int]]) -> None:
    with IndexedWriter(prefix, "uint16") as writer:
        for document in documents:
            writer.add_sequence(document)
            writer.end_document()


def pubmed_abstracts() -> Iterator[str]:
    for path in sorted((SHARED / "data" / "pubmed").glob("*.xml")):
        for abstract in ElementTree.parse(path).iter("Abstract"):
            text = " ".join("".join(part.itertext()).strip() for part in abstract.iter("AbstractText"))
            if text.isascii() and len(text) > 200:
                yield text


def guidelines() -> Iterator[str]:
    """The sections of a national book of treatment guidelines."""
    for content in _archived(SHARED / "data" / "guidelines" / "nstg2022.tar.gz", r".*\.txt"):
        yield content.decode("utf-8", errors="ignore")


def health_questions() -> Iterator[str]:
    """Questions and answers of MedQuAD, of its part written for older people."""
    for content in _archived(SHARED / "data" / "medquad_ccby4.tar.gz", r".*SeniorHealth.*\.xml"):
        for pair in ElementTree.fromstring(content).iter("QAPair"):
            answer = pair.findtext("Answer")
            if answer:
                yield f"{pair.findtext('Question')}\n{answer}"


def _archived(archive: Path, pattern: str) -> list[bytes]:
    """The files of a compressed archive whose names match, in the order of their names."""
    found = {}
    with tarfile.open(archive, "r|gz") as opened:  # read once from front to end
        for member in opened:
            if member.isfile() and re.fullmatch(pattern, member.name):
                content = opened.extractfile(member)
                assert content is not None
                found[member.name] = content.read()
    return [found[name] for name in sorted(found)]


def words(settings: Mapping[str, Any]) -> list[str]:
    """`{"train.steps": 3}` → `--train.steps 3`."""
    return [part for name, value in settings.items() for part in (f"--{name}", str(value))]


def read_metrics(log: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (log / "metrics.jsonl").read_text().splitlines()]


def series(log: Path, name: str) -> np.ndarray:
    return np.array([line[name] for line in read_metrics(log)])
