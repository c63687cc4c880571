"""GPT-2's two files, a vocabulary and its merges, as a `tokenizer.json`."""

from __future__ import annotations

import json
from pathlib import Path

from megatron.utils.errors import DataError

END_OF_TEXT = "<|endoftext|>"


def merges_of(vocabulary: Path) -> Path:
    """Where the merges of a vocabulary are: in `merges.txt` for `vocab.json`, `x-merges.txt` for `x-vocab.json`."""
    return vocabulary.with_name(f"{vocabulary.stem.removesuffix('vocab')}merges.txt")


def find_merges(vocabulary: Path) -> Path | None:
    """The merges beside a vocabulary, or None if the file is not named as one or they are not there."""
    merges = merges_of(vocabulary)
    return merges if vocabulary.stem.endswith("vocab") and merges.is_file() else None


def find_vocabulary(folder: Path) -> Path | None:
    """The vocabulary of a folder: `vocab.json`, or the only file that ends so; with merges beside it."""
    candidates = [folder / "vocab.json"] if (folder / "vocab.json").is_file() else sorted(folder.glob("*vocab.json"))
    candidates = [candidate for candidate in candidates if find_merges(candidate)]
    if len(candidates) > 1:
        names = ", ".join(candidate.name for candidate in candidates)
        raise DataError(f"the folder {folder} holds several vocabularies ({names}); name the one to use")
    return candidates[0] if candidates else None


def combine(vocabulary: Path, content: bytes, merges: Path) -> bytes:
    """A tokenizer.json of the two files, which splits text into words as GPT-2 does. Raises DataError."""
    try:
        ids = json.loads(content)
        lines = merges.read_text(encoding="utf-8").removeprefix("\ufeff").replace("\r\n", "\n").split("\n")
    except (OSError, ValueError) as error:
        raise DataError(f"{vocabulary} and {merges.name} cannot be read as GPT-2's vocabulary: {error}") from error
    if not isinstance(ids, dict) or not all(isinstance(identity, int) for identity in ids.values()):
        raise DataError(f"{vocabulary} is not a vocabulary: it does not give a number to each piece")
    pairs = [line.split(" ") for line in lines[lines[0].startswith("#version") :] if line]
    for number, pair in enumerate(pairs, start=1):
        if len(pair) != 2 or not all(part in ids for part in (*pair, "".join(pair))):
            raise DataError(
                f"{merges}: merge {number} ({' '.join(pair)!r}) is not two pieces of {vocabulary.name} whose join is a "
                "third; are the two files of the same tokenizer?"
            )
    special = [token for token in (END_OF_TEXT,) if token in ids]
    return json.dumps(
        {
            "version": "1.0",
            "added_tokens": [
                {
                    "id": ids[token],
                    "content": token,
                    "single_word": False,
                    "lstrip": False,
                    "rstrip": False,
                    "normalized": False,
                    "special": True,
                }
                for token in special
            ],
            "normalizer": None,
            "pre_tokenizer": {
                "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
            },
            "post_processor": None,
            "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
            "model": {"type": "BPE", "unk_token": None, "vocab": ids, "merges": pairs},
        }
    ).encode("ascii")  # fmt: skip
