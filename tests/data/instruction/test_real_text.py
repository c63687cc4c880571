"""Real questions and answers: from JSON lines to packed rows with losses on the answers, nearly without padding."""

from __future__ import annotations

import json
import tarfile
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np

from megatron.__main__ import main
from megatron.data.instruction.dataset import Batching, InstructionDataset
from megatron.data.instruction.order import InOrder, Order
from megatron.data.instruction.pair import ConversationPair
from megatron.model.loss import IGNORED
from megatron.tokenizer import load_tokenizer

TAGS = "<|im_start|>,<|im_end|>"
LENGTH = 1024


def questions(archive: Path) -> list[dict[str, str]]:
    """Those of MedQuAD's part for older people that have an answer."""
    found = []
    with tarfile.open(archive, "r|gz") as opened:
        for member in opened:
            if member.isfile() and "SeniorHealth" in member.name:
                content = opened.extractfile(member)
                assert content is not None
                for pair in ElementTree.fromstring(content.read()).iter("QAPair"):
                    if answer := (pair.findtext("Answer") or "").strip():
                        found.append({"question": (pair.findtext("Question") or "").strip(), "response": answer})
    return found


def test_real_questions_and_answers(shared: Path, tmp_path: Path) -> None:
    lines = questions(shared / "data" / "medquad_ccby4.tar.gz")
    data, model = tmp_path / "data.jsonl", shared / "data" / "tokenizers" / "mistral_v1_tokenizer.model"
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    words = ["preprocess", "--chat", "--chat-template", "megatron-llm", "--input", data, "--output-prefix",
             tmp_path / "medquad", "--tokenizer", model, "--extra-tokens", TAGS, "--question-key", "question",
             "--answer-key", "response", "--workers", 1]  # fmt: skip
    assert main([str(word) for word in words]) == 0
    pair, tokenizer = ConversationPair(str(tmp_path / "medquad")), load_tokenizer(model, TAGS.split(","))
    assert len(pair) == len(lines) > 500
    order = np.random.default_rng(1).permutation(len(pair))
    dataset = InstructionDataset(
        [pair], Order([InOrder(order)]), Batching(LENGTH, True), vocab_size=tokenizer.vocab_size
    )
    assert 1 - np.minimum(pair.sizes - 1, LENGTH).sum() / (len(dataset) * LENGTH) < 0.03, "too much padding"
    for row in range(0, len(dataset), 7):
        micro = dataset.micro_batches(np.array([[row]]))[0]
        assert micro.documents is not None
        labels, starts = micro.labels[0], micro.documents.starts[0]
        for number, start in zip(order[dataset.conversations(row)], starts.unique().tolist(), strict=False):
            learned = labels[(starts == start) & (labels != IGNORED)].tolist()
            answer = f"<|im_start|>answer\n{lines[number]['response']}<|im_end|>\n"
            if pair.sizes[number] <= LENGTH + 1:
                assert learned == tokenizer.encode(answer)
            else:
                assert learned == tokenizer.encode(answer)[: len(learned)] and len(learned) > 0.9 * LENGTH
