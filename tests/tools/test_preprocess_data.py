"""Megatron-LLM's tokenizing and merging tools: its documented command lines as they stand, and its ids."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import sentencepiece

from megatron.data.indexed import IndexedReader
from megatron.data.provenance import read_provenance
from megatron.utils.errors import ConfigError
from tools.preprocess_data import words_of_verb

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ["Fever <s>and</s> pain.", "", "a<EOD>b <PAD>[bib] c [/bib]d<extra_id_1>", "\n", "  x\n\n", "µg <CLS><unk>"]
LIST = "[bib_ref],[/bib_ref],[fig_ref],[/fig_ref],[bib],[/bib],[fig],[/fig],[table],[/table],[formula],[/formula]"


@pytest.fixture
def model(shared: Path) -> Path:
    return shared / "data/tokenizers/mistral_v1_tokenizer.model"  # 32,000 pieces with Llama-2's special ids


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    path = tmp_path / "raw.jsonl"
    path.write_text("".join(json.dumps({"text": text, "id": 3}) + "\n" for text in TEXTS))
    return path


def run(line: str, **environment: str) -> subprocess.CompletedProcess[str]:
    words = shlex.split(line)
    assert words[0] in ("python", "python3")
    return subprocess.run(
        [sys.executable, *words[1:]], cwd=ROOT, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def documents_of(prefix: Path | str) -> list[list[int]]:
    reader = IndexedReader(prefix)
    return [reader.read(number).tolist() for number in range(len(reader))]


def by_the_rules(model: Path, text: str, new_tokens: bool, numbered: int, listed: list[str]) -> list[int]:
    """The ids of a text as section 9 of the format notes has it, written out."""
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    special: dict[str, int] = {}
    pieces = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    size = len(pieces)

    def register(token: str) -> None:
        nonlocal size
        if token in special:
            return
        special[token] = pieces.get(token, size)
        size += token not in pieces

    for token in ("<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"):
        if new_tokens or token in pieces:
            register(token)
    for token in ("<s>", "</s>", *(f"<extra_id_{number}>" for number in range(numbered)), *listed):
        register(token)
    ids: list[int] = []
    while text:
        found = [(text.find(token), order, token) for order, token in enumerate(special) if token in text]
        at, _, token = min(found, default=(len(text), 0, ""))
        ids += processor.encode(text[:at]) if at else []
        ids += [special[token]] if token else []
        text = text[at + len(token) :]
    return ids


@pytest.mark.parametrize(
    ("flags", "new_tokens", "numbered", "listed", "eod"),
    [
        ("--no_new_tokens", False, 0, [], 2),
        ("", True, 0, [], 32_002),
        ("--vocab_extra_ids 3 --vocab_extra_ids_list=" + shlex.quote(LIST), True, 3, LIST.split(","), 32_002),
        (
            "--no_new_tokens --vocab-extra-ids 2 --vocab_extra_ids_list '[bib], [/bib]'",
            False,
            2,
            ["[bib]", " [/bib]"],
            2,
        ),
    ],
)
def test_ids_are_those_of_the_rules(
    corpus: Path, model: Path, tmp_path: Path, flags: str, new_tokens: bool, numbered: int, listed: list[str], eod: int
) -> None:
    done = run(
        f"python tools/preprocess_data.py --input={corpus} --output_prefix={tmp_path}/out/p --append_eod --workers=2 "
        f"--tokenizer_type=SentencePieceTokenizer --vocab_file={model} --chunk_size=32 {flags}"
    )
    assert done.returncode == 0, done.stderr
    expected = [by_the_rules(model, text, new_tokens, numbered, listed) for text in TEXTS]
    assert documents_of(tmp_path / "out/p_text_document") == [[*ids, eod] for ids in expected if ids]
    provenance = read_provenance(tmp_path / "out/p_text_document")
    assert provenance is not None and (provenance.eod_id, provenance.append_eod) == (eod, True)
    assert provenance.vocabulary_size == 32_000 + 5 * new_tokens + numbered + len(listed)


DOCUMENTED = [
    "python tools/preprocess_data.py --input=RAW --output_prefix=OUT --tokenizer_type=SentencePieceTokenizer "
    "--vocab_file=MODEL --chunk_size=32 --workers=16 --no_new_tokens",
    "python3 tools/preprocess_data.py --input RAW --output_prefix OUT --dataset_impl mmap --tokenizer_type "
    "FalconTokenizer --workers 2 --chunk_size 32 --append_eod",
    "python tools/preprocess_data.py --input=RAW --output_prefix=OUT --dataset_impl=mmap "
    "--tokenizer_type=SentencePieceTokenizer --vocab_file=MODEL --workers=2 --chunk_size=32",
    "python tools/preprocess_data.py --input RAW --output_prefix OUT --vocab_file MODEL --dataset_impl mmap "
    f'--tokenizer_type SentencePieceTokenizer --vocab_extra_ids_list "{LIST}" --json_keys "text" --workers 8 '
    "--chunk_size 2048 --append_eod",
]


@pytest.mark.parametrize("line", DOCUMENTED)
def test_documented_command_lines_work_as_they_stand(
    corpus: Path, model: Path, tmp_path: Path, line: str, shared: Path
) -> None:
    line = (
        line.replace("RAW", str(corpus)).replace("OUT", f"{tmp_path}/tokenized/starcoder").replace("MODEL", str(model))
    )
    home = tmp_path / "hub"
    falcon = home / "hub/models--tiiuae--falcon-40b"
    (falcon / "snapshots/abc").mkdir(parents=True)
    (falcon / "refs").mkdir()
    (falcon / "refs/main").write_text("abc")
    write_falcon_like(falcon / "snapshots/abc", shared)
    done = run(line, HF_HOME=str(home))
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / "tokenized/starcoder_text_document")


def write_falcon_like(folder: Path, shared: Path) -> None:
    """A byte-level BPE with Falcon's end of text, made of GPT-2's tiny one."""
    import tokenizers

    vocabulary, merges = (str(shared / f"data/megatron/gpt2-tiny-{name}") for name in ("vocab.json", "merges.txt"))
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE.from_file(vocabulary, merges))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def test_gpt2_files(corpus: Path, shared: Path, tmp_path: Path) -> None:
    vocabulary, merges = (shared / f"data/megatron/gpt2-tiny-{name}" for name in ("vocab.json", "merges.txt"))
    flags = f"--tokenizer-type GPT2BPETokenizer --vocab-file {vocabulary} --merge-file {merges}"
    line = f"python tools/preprocess_data.py --input {corpus} --output-prefix {tmp_path}/p --append-eod {flags}"
    done = run(line)
    assert done.returncode == 0, done.stderr
    eod = json.loads(vocabulary.read_text())["<|endoftext|>"]
    assert {document[-1] for document in documents_of(tmp_path / "p_text_document")} == {eod}


COMMON = ["--input", "x", "--output_prefix", "p"]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([*COMMON], "required: --tokenizer_type"),
        ([*COMMON, "--tokenizer_type", "BertWordPieceCase"], "masked language models"),
        ([*COMMON, "--tokenizer_type", "SentencePieceTokenizer"], "needs --vocab_file"),
        ([*COMMON, "--tokenizer_type", "GPT2BPETokenizer", "--vocab_file", "v"], "needs --vocab_file and --merge_file"),
        ([*COMMON, "--tokenizer_type=FalconTokenizer", "--dataset_impl=lazy"], "only mmap is written"),
        ([*COMMON, "--tokenizer_type=FalconTokenizer", "--split-sentences"], "a document is one sequence"),
        ([*COMMON, "--tokenizer_type=FalconTokenizer", "--vocab_extra_ids=-1"], "--vocab_extra_ids -1"),
        ([*COMMON, "--tokenizer_type=FalconTokenizer", "--vocab_extra_ids_list", "'a,b'"], "quotes within its tokens"),
        ([*COMMON, "--tokenizer_type=FalconTokenizer", "--append"], "unrecognized arguments: --append"),
    ],
)
def test_what_cannot_be_is_refused_with_the_reason(words: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(said)):
        words_of_verb(words)


def test_errors_are_one_line(corpus: Path, model: Path, tmp_path: Path) -> None:
    done = run(f"python tools/preprocess_data.py --input {corpus}", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and done.stderr.startswith("preprocess_data.py: error: ")
    line = f"python tools/preprocess_data.py --input {corpus} --output_prefix {tmp_path}/p"
    done = run(f"{line} --tokenizer_type FalconTokenizer", HF_HOME=str(tmp_path))
    assert done.returncode == 2 and "falcon-40b is not in the cache" in done.stderr and "Traceback" not in done.stderr


def test_pairs_of_a_folder_are_merged(corpus: Path, model: Path, tmp_path: Path) -> None:
    for name in ("b", "a"):
        words = f"--tokenizer_type=SentencePieceTokenizer --vocab_file={model} --no_new_tokens --workers=1"
        done = run(f"python tools/preprocess_data.py --input={corpus} --output_prefix={tmp_path}/parts/{name} {words}")
        assert done.returncode == 0, done.stderr
    done = run(f"python tools/merge_datasets.py --input {tmp_path}/parts --output_prefix {tmp_path}/merged")
    assert done.returncode == 0, done.stderr
    assert documents_of(tmp_path / "merged") == 2 * documents_of(tmp_path / "parts/a_text_document")
