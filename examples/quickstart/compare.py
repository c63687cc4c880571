"""Loads an exported model with `transformers`, compares it with the checkpoint as run here, and lets it speak.

    python examples/quickstart/compare.py CHECKPOINT EXPORT DATA_PREFIX HELD_OUT_TEXT

Prints one JSON object. Fails where any logit differs by more than 1e-4, or the two tokenizers in any token.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.data.indexed import IndexedReader
from megatron.data.windows import StreamWindows
from megatron.model.config import ModelConfig
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import single_rank

TOLERANCE = 1e-4
BATCH = 16
SEED = 4


def load_ours(folder: str) -> Transformer:
    """The checkpoint as one process runs it, in float32."""
    with open_source(folder) as source:
        model = Transformer(ModelConfig.from_huggingface(source.model_config), single_rank(), torch.float32)
        load_weights(model, source)
    return model


def batches(prefix: str, sequence_length: int) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Tokens and labels [b, s] of the whole stream; -1 where a short last window has no label."""
    windows = StreamWindows(prefix, sequence_length)
    for first in range(0, len(windows), BATCH):
        last = min(first + BATCH, len(windows))
        samples = torch.stack([torch.from_numpy(windows.sample(index)) for index in range(first, last)])
        yield samples[:, :-1].clamp(min=0), samples[:, 1:]


def compare_models(ours: Transformer, theirs: Any, prefix: str) -> dict[str, float | int]:
    """The mean loss of both over the stream, and the largest difference of two logits."""
    losses, tokens, difference = torch.zeros(2, dtype=torch.float64), 0, 0.0
    vocabulary = ours.config.vocab_size
    for inputs, labels in batches(prefix, ours.config.max_position_embeddings):
        both = (ours(inputs)[..., :vocabulary].transpose(0, 1), theirs(inputs).logits)  # [b, s, v] each
        carried = labels.ge(0)
        difference = max(difference, float((both[0] - both[1]).abs()[carried].max()))
        losses += torch.stack([cross_entropy(x[carried], labels[carried], reduction="sum").double() for x in both])
        tokens += int(carried.sum())
    mean = (losses / tokens).tolist()
    return {
        "loss": mean[0],
        "loss_transformers": mean[1],
        "largest_logit_difference": difference,
        "tokens": tokens,
    }


def differing_documents(tokenizer: Any, prefix: str, text: Path) -> int:
    """How many documents transformers' tokenizer encodes otherwise than the data file has them."""
    reader = IndexedReader(prefix)
    documents = [json.loads(line)["text"] for line in text.read_text(encoding="utf-8").splitlines()]
    wanted = [[*tokenizer.encode(document, add_special_tokens=False), tokenizer.eos_token_id] for document in documents]
    return sum(reader.read(index).tolist() != ids for index, ids in enumerate(wanted))


def speak(model: Any, tokenizer: Any) -> str:
    """A text that the model writes by itself, by chance but the same each time."""
    torch.manual_seed(SEED)
    start = tokenizer("Case note:", add_special_tokens=False, return_tensors="pt")["input_ids"]
    written = model.generate(start, max_new_tokens=80, do_sample=True, temperature=0.5, top_k=20, pad_token_id=0)
    return str(tokenizer.decode(written[0], skip_special_tokens=True))


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Compare an exported model with its checkpoint.")
    for name in ("checkpoint", "export", "data", "text"):
        parser.add_argument(name)
    arguments = parser.parse_args(words)
    theirs = AutoModelForCausalLM.from_pretrained(arguments.export, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(arguments.export)
    with torch.no_grad():
        result = compare_models(load_ours(arguments.checkpoint), theirs, arguments.data)
    differing = differing_documents(tokenizer, arguments.data, Path(arguments.text))
    print(json.dumps({**result, "differing_documents": differing, "sample": speak(theirs, tokenizer)}))
    if result["largest_logit_difference"] > TOLERANCE or differing:
        print(f"transformers does not agree: {result}, {differing} documents are encoded otherwise", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
