"""What `megatron preprocess` is asked for, and the checks that need no file."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from megatron.data.instruction.encode import ChatEncoding
from megatron.data.instruction.pair import role_prefix, text_prefix
from megatron.data.preprocess.inputs import Shard
from megatron.data.preprocess.quarantine import DEFAULT_BUDGET, BadLineBudget
from megatron.tokenizer import SpecialTokens
from megatron.utils.errors import ConfigError


@dataclass(frozen=True)
class PreprocessOptions:
    """What the command line asks for.

    `inputs` are files, folders, patterns or `-`. `eod_token` None means the tokenizer's end of sentence; it is for
    `append_eod` alone.
    `special_tokens` says what control tokens that are written out in a text become. With `chat`, lines are
    conversations. `restart` drops what an earlier run left to go on with.
    """

    inputs: tuple[str | Path, ...]
    output_prefix: str
    tokenizer: Path
    workers: int = 1
    append_eod: bool = False
    eod_token: str | None = None
    json_keys: tuple[str, ...] = ("text",)
    extra_tokens: tuple[str, ...] = ()
    prepend_bos: bool = False
    special_tokens: SpecialTokens = "text"
    chat: ChatEncoding | None = None
    max_bad_lines: BadLineBudget = DEFAULT_BUDGET
    shard: Shard | None = None
    restart: bool = False

    @property
    def run_prefix(self) -> str:
        """What the names of all files of the run begin with."""
        return self.output_prefix if self.shard is None else f"{self.output_prefix}.{self.shard.label}"

    @property
    def pair_prefixes(self) -> list[str]:
        """The prefix of each key's pair; of conversations, of the pair of tokens and of that of roles."""
        if self.chat is not None:
            return [text_prefix(self.run_prefix), role_prefix(self.run_prefix)]
        return [f"{self.run_prefix}_{key}_document" for key in self.json_keys]

    @property
    def read_keys(self) -> tuple[str, ...]:
        """The keys that are read of each line."""
        return self.json_keys if self.chat is None else self.chat.keys.read

    @property
    def line_rule(self) -> str:
        """What every line must be, in words."""
        if self.chat is not None:
            return self.chat.keys.rule
        return f"every line must be a JSON object with a text under {', '.join(map(repr, self.json_keys))}"

    def check(self) -> None:
        """Raise ConfigError for what cannot be."""
        if self.workers < 1:
            raise ConfigError(f"--workers {self.workers} is not a number of processes; use 1 or more")
        ends = {"append-eod": self.append_eod, "prepend-bos": self.prepend_bos, "eod-token": self.eod_token}
        if self.chat is not None and any(ends.values()):
            option = next(name for name, given in ends.items() if given)
            raise ConfigError(
                f"--{option} with --chat: a template says how a conversation begins and ends; leave it out"
            )
        if self.eod_token is not None and not self.append_eod:
            raise ConfigError(
                f"--eod-token {self.eod_token} names the token that --append-eod appends: add --append-eod, or leave "
                "--eod-token out"
            )
        if len(set(self.json_keys)) != len(self.json_keys):
            raise ConfigError(f"--json-keys {' '.join(self.json_keys)} names a key twice; name each once")
        unusable = [key for key in self.json_keys if not key or "/" in key]
        if unusable:
            raise ConfigError(
                f"--json-keys: {unusable[0]!r} cannot be part of a file name; rename the key in the input"
            )
        if not Path(self.output_prefix).name or self.output_prefix.endswith(("/", "/.")):
            raise ConfigError(
                f"--output-prefix {self.output_prefix!r} is not the first part of a file name; give one, as in "
                f"{Path(self.output_prefix) / 'corpus'}"
            )

    def that_matter(self, tokenizer_fingerprint: str, eod_id: int | None) -> dict[str, Any]:
        """What the outputs depend on besides the inputs, as JSON values."""
        return {
            "tokenizer": tokenizer_fingerprint,
            "extra_tokens": list(self.extra_tokens),
            "json_keys": list(self.json_keys),
            "append_eod": self.append_eod,
            "eod_id": eod_id,
            "prepend_bos": self.prepend_bos,
            "special_tokens": self.special_tokens,
            "chat": None if self.chat is None else asdict(self.chat),
            "shard": None if self.shard is None else f"{self.shard.index}/{self.shard.count}",
        }
