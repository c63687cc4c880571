"""Whether a model folder computes what transformers computes: logits on real tokens, layer by layer if asked.

transformers is imported only here and only when asked for: nothing else needs it.
"""

from __future__ import annotations

import dataclasses
import importlib
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from megatron.checkpoint.check import check_weights
from megatron.checkpoint.convert import convert
from megatron.checkpoint.hub import local_folder
from megatron.checkpoint.huggingface import is_huggingface
from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.data.indexed import IndexedReader
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.model.transformer import Transformer
from megatron.parallel.mesh import Grid, connect
from megatron.tokenizer import find_tokenizer, load_tokenizer
from megatron.utils.errors import ConfigError
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)

# float32 moves logits by about 1e-5 of their size; the rule of golden logits is 1e-4.
TOLERANCE = 1e-4


@dataclass(frozen=True)
class Wish:
    """What to compare on: a pair's prefix or a text file, in rows of so many tokens, so many at a time, so often."""

    data: str
    sequence_length: int = 256
    micro_batch: int = 1
    batches: int = 10
    device: str = "cpu"
    layers: bool = False


@dataclass(frozen=True)
class Agreement:
    """Of one batch: the largest and the mean difference of the logits, their largest size, the difference of the mean
    losses, and the largest difference behind each layer but the last (empty unless asked for)."""

    largest: float
    mean: float
    size: float
    loss: float
    layers: tuple[float, ...]

    @property
    def holds(self) -> bool:
        """Whether the logits differ by no more than arithmetic in float32 explains."""
        return self.largest <= TOLERANCE * max(1.0, self.size)


class Comparer:
    """Our model of `folder` and transformers' of `reference`, both in float32 and of any format: what transformers does
    not read is converted for it, into a temporary folder. It runs on `device`, or where there is none such, on the CPU.

    Raises ConfigError where their configurations are of different functions, before anything is computed: an eps, a
    rotary base or a window may differ without being seen in the logits of some text.
    """

    def __init__(self, folder: str | Path, reference: str | Path, device: str = "cpu") -> None:
        self._device = _available(device)
        with open_source(folder) as source, open_source(reference) as other:
            config = ModelConfig.from_huggingface(source.model_config)
            check_same_function(config, ModelConfig.from_huggingface(other.model_config), source.folder, other.folder)
            check_weights(source, canonical_shapes(config))
            self.model = Transformer(config, connect(Grid(), 0))
            load_weights(self.model, source)
        with _as_huggingface(Path(reference)) as readable:
            self._reference = _load_reference(readable, self._device)

    def __call__(self, tokens: torch.Tensor, layers: bool = False) -> Agreement:
        """Compare on tokens [b, s]."""
        with torch.no_grad(), _hidden_states(self.model) as ours:
            logits = self.model(tokens)[..., : self.model.config.vocab_size].transpose(0, 1)
            theirs = self._reference(tokens.to(self._device), output_hidden_states=layers)
        other = theirs.logits.float().cpu()
        difference = (logits - other).abs()
        losses = [
            torch.nn.functional.cross_entropy(side[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).item()
            for side in (logits, other)
        ]
        behind = zip(ours, theirs.hidden_states[1:-1], strict=False) if layers else ()
        return Agreement(
            difference.max().item(),
            difference.mean().item(),
            other.abs().max().item(),
            abs(losses[0] - losses[1]),
            tuple((mine - their.float().cpu()).abs().max().item() for mine, their in behind),
        )


def check_same_function(first: ModelConfig, second: ModelConfig, first_name: object, second_name: object) -> None:
    """Raise ConfigError where two configurations describe different functions."""
    pairs = ((field.name, getattr(first, field.name), getattr(second, field.name)) for field in _fields(first))
    different = [f"{name}={one} and {other}" for name, one, other in pairs if one != other]
    if different:
        raise ConfigError(f"{first_name} and {second_name} are different functions: {'; '.join(different)}")


def _fields(config: ModelConfig) -> list[dataclasses.Field[Any]]:
    """Those that the function depends on: not how random weights begin, and how long sequences are made for only where
    positions are learned or scaled."""
    without = {"initializer_range"}
    if config.rope_scaling is None and config.family.positions is None:
        without.add("max_position_embeddings")
    return [field for field in dataclasses.fields(config) if field.name not in without]


def read_batches(
    data: str, folders: Sequence[Path], sequence_length: int, micro_batch: int, batches: int
) -> Iterator[torch.Tensor]:
    """Tokens [b, s] of a `.bin/.idx` pair, or of a text file by the tokenizer of the first folder that has one.

    Raises ConfigError where there is neither, or less than one batch of one row.
    """
    tokens = _tokens_of(data, folders, sequence_length * micro_batch * batches)
    rows = len(tokens) // sequence_length
    if rows == 0:
        if len(tokens) < 2:
            raise ConfigError(f"{data} holds {len(tokens)} tokens; at least 2 are needed")
        rows, sequence_length = 1, len(tokens)
    table = torch.tensor(tokens[: rows * sequence_length]).view(rows, sequence_length)
    yield from table[: micro_batch * batches].split(micro_batch)


def _tokens_of(data: str, folders: Sequence[Path], most: int) -> list[int]:
    if Path(f"{data}.idx").is_file():
        reader, tokens = IndexedReader(data), list[int]()
        for number in range(len(reader)):
            if len(tokens) >= most:
                break
            tokens += reader.read(number).tolist()
        return tokens[:most]
    if not Path(data).is_file():
        raise ConfigError(f"{data} is neither the prefix of a .bin/.idx pair nor a text file")
    tokenizer = next((found for folder in folders if (found := find_tokenizer(folder)) is not None), None)
    if tokenizer is None:
        raise ConfigError(f"{data} is a text, and no tokenizer is in {' or '.join(map(str, folders))}: give a pair")
    return load_tokenizer(tokenizer).encode(Path(data).read_text(encoding="utf-8"))[:most]


def _available(device: str) -> torch.device:
    """The device, or the CPU where this machine does not have it."""
    wanted = torch.device(device)
    if wanted.type == "cuda" and (wanted.index or 0) >= torch.cuda.device_count():
        _logger.info("there is no %s here: transformers computes on the CPU", device)
        return torch.device("cpu")
    return wanted


@contextmanager
def _as_huggingface(folder: Path) -> Iterator[Path]:
    if is_huggingface(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        converted = Path(temporary) / "huggingface"
        convert(folder, converted, to="huggingface")
        yield converted


def _load_reference(folder: Path, device: torch.device) -> Any:
    try:
        transformers = importlib.import_module("transformers")
    except ImportError as error:
        raise ConfigError(
            "transformers is not installed: `pip install 'megatron-med[hf]'`, or leave the comparison out"
        ) from error
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, attn_implementation="eager"
    )
    return model.to(device).eval()


@contextmanager
def _hidden_states(model: Transformer) -> Iterator[Sequence[torch.Tensor]]:
    """Collects what is behind each layer, as [b, s, h]."""
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, inputs: Any, output: tuple[torch.Tensor, torch.Tensor | None]) -> None:
        hidden, branch = output
        found.append((hidden if branch is None else hidden + branch).transpose(0, 1))

    handles = [block.register_forward_hook(keep) for block in model.blocks]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


def agreements(folder: Path, reference: Path, wish: Wish) -> Iterator[Agreement]:
    """The agreement of each batch. Raises as `Comparer` and `read_batches`."""
    folder, reference = local_folder(folder), local_folder(reference)
    with open_source(folder) as first, open_source(reference) as second:
        folders = [source.tokenizer_folder for source in (second, first)]
    comparer = Comparer(folder, reference, wish.device)
    length = min(wish.sequence_length, comparer.model.config.max_position_embeddings)
    for tokens in read_batches(wish.data, folders, length, wish.micro_batch, wish.batches):
        yield comparer(tokens, wish.layers)


def agreement_line(number: int, found: Agreement) -> str:
    """One batch, for people."""
    line = (
        f"batch {number}: logits differ by {found.largest:.3e} at most, {found.mean:.3e} in the mean, of "
        f"{found.size:.1f}; the loss by {found.loss:.3e}"
    )
    layers = "".join(f"\n  behind layer {at}: {value:.3e}" for at, value in enumerate(found.layers, 1))
    return line + layers


def verdict(found: Sequence[Agreement]) -> str:
    """What all batches say together."""
    worst = max(agreement.largest for agreement in found)
    if all(agreement.holds for agreement in found):
        return f"equal to transformers: logits of {len(found)} batches differ by {worst:.3e} at most"
    return f"NOT equal to transformers: logits differ by {worst:.3e}, more than arithmetic explains"
