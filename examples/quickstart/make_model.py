"""Makes what a user would bring along: a Llama in Hugging Face's format, here a tiny one with random weights.

    python examples/quickstart/make_model.py CORPUS FOLDER

A SentencePiece tokenizer as Llama's (BPE with byte fallback) is trained on the corpus, and `transformers` itself makes
and writes the model, so the quickstart starts from a folder that nothing of this project has touched.
"""

from __future__ import annotations

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path

VOCABULARY = 1024
SEED = 1


def lines(corpus: Path) -> Iterator[str]:
    """The lines of all documents; a newline itself is left to the byte pieces, as in Llama's tokenizer."""
    with corpus.open(encoding="utf-8") as file:
        for document in file:
            yield from json.loads(document)["text"].splitlines()


def train_tokenizer(corpus: Path) -> bytes:
    """A `tokenizer.model` with Llama's settings: unknown 0, beginning 1, end 2, then 256 bytes, then pieces."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=lines(corpus),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=0.9999,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    return model.getvalue()


def write_model(folder: Path) -> int:
    """Write a random Llama (config.json, model.safetensors); returns its number of parameters."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder)
    return int(model.num_parameters())


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Make a tiny random Llama, with a tokenizer trained on a corpus.")
    parser.add_argument("corpus", type=Path, metavar="CORPUS", help="JSON lines with a text each")
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="folder to write")
    arguments = parser.parse_args(words)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    (arguments.folder / "tokenizer.model").write_bytes(train_tokenizer(arguments.corpus))
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (arguments.folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    parameters = write_model(arguments.folder)
    print(f"{arguments.folder}: Llama of {parameters:,} parameters, {VOCABULARY:,} pieces in its vocabulary")


if __name__ == "__main__":
    main()
