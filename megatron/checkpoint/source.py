"""Reading slices of canonical tensors from wherever a model is kept.

A Hugging Face folder, one of our step folders and a save folder look the same through `Source`. It must not know ranks
or models, but for the part of their names that a family's files may leave out: who reads what is the caller's business,
and a rank's reads touch only the files and rows it asks for.
"""

from __future__ import annotations

import copy
from collections import OrderedDict
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import torch
import yaml

from megatron.checkpoint.hub import local_folder
from megatron.checkpoint.huggingface import (
    MODEL_CONFIG,
    PICKLE,
    PICKLE_INDEX,
    SHARD_INDEX,
    SINGLE,
    index_huggingface,
    is_huggingface,
    open_file,
    read_config,
    with_prefix,
)
from megatron.checkpoint.index import Index, StoredPiece, StoredTensor
from megatron.checkpoint.manager import newest_checkpoint, read_pointer
from megatron.checkpoint.megatron_llm import LATEST, find_megatron, index_megatron
from megatron.checkpoint.meta import PARAMS, index_meta, is_meta
from megatron.checkpoint.native import (
    MANIFEST,
    RUN_CONFIG,
    Manifest,
    carried_files,
    check_sizes,
    read_carried,
    read_manifest,
    step_of,
)
from megatron.checkpoint.peft import ADAPTER_CONFIG, StoredAdapter, is_peft, read_peft
from megatron.checkpoint.strided import Entry
from megatron.checkpoint.tensor_file import TensorReader
from megatron.model.families import FAMILIES
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError
from megatron.utils.hub import spelling_hint
from megatron.utils.logging import get_logger

_logger = get_logger(__name__)

_OPEN_FILES = 128  # a process may hold about a thousand, and a checkpoint of many ranks has more


Format = Literal["huggingface", "native", "meta", "megatron-llm", "peft"]


def _seen(piece: StoredPiece, entry: Entry) -> Entry:
    """A stored tensor as a piece sees it."""
    if piece.matrix is None:
        return entry
    offset = entry.offset + piece.matrix[0] * entry.dtype.itemsize
    return replace(entry, shape=piece.seen(entry.shape), offset=offset, strides=None)


class Source:
    """An opened model. Use it as a context manager, or call `close`."""

    def __init__(
        self,
        folder: Path,
        index: Index,
        weight_files: list[str],
        *,
        format: Format,
        model_config: dict[str, Any],
        manifest: Manifest | None = None,
        state: dict[str, Any] | None = None,
        tokenizer_folder: Path | None = None,
        adapter: StoredAdapter | None = None,
    ) -> None:
        """`state` is what the trainer saved of itself, where no manifest holds it. With an `adapter` the weights are
        those of adapters, not of a model."""
        self.folder, self.index, self.weight_files = folder, index, weight_files
        self.format: Format = format
        self.manifest = manifest  # None where it is no checkpoint of ours
        self.model_config = model_config
        self.tokenizer_folder = tokenizer_folder or folder
        self.tokenizer_files: list[Path] = carried_files(self.tokenizer_folder)
        self.run_config: dict[str, Any] | None = None if manifest is None else _read_run_config(folder / RUN_CONFIG)
        self.state = manifest.state if manifest is not None else state
        self.adapter = adapter
        self._readers: OrderedDict[str, TensorReader] = OrderedDict()

    @property
    def parts(self) -> list[Source]:
        """The folders that the weights are read from, each as a source of its own."""
        return [self]

    @property
    def step(self) -> int:
        """The step after which it was saved; 0 for a model that carries no training state."""
        return int((self.state or {}).get("step", 0)) if self.manifest is None else self.manifest.step

    @property
    def has_optimizer(self) -> bool:
        return bool(self.index.get("exp_avg"))

    def shapes(self, kind: str = "weights") -> dict[str, tuple[int, ...]]:
        """Canonical name -> shape of everything stored of a kind ("weights", "master", "exp_avg", "exp_avg_sq")."""
        return {name: stored.shape for name, stored in self.index.get(kind, {}).items()}

    def files(self, *kinds: str) -> set[str]:
        """The files that hold tensors of these kinds."""
        tensors = (stored for kind in kinds for stored in self.index.get(kind, {}).values())
        return {piece.file for stored in tensors for piece in stored.pieces}

    def dtype(self, name: str, kind: str = "weights") -> torch.dtype:
        """The dtype in which a tensor is stored."""
        return self._stored(name, kind).pieces[0].dtype

    def read(self, region: Region, out: torch.Tensor, kind: str = "weights") -> None:
        """Fill `out` (the region's size; any strides, device and dtype) with a region, cast to the dtype of `out`.

        Raises CheckpointError where the tensor is missing, has another shape, or its file is damaged.
        """
        assert tuple(out.shape) == region.size, (region, out.shape)
        stored = self._stored(region.name, kind)
        if stored.shape != region.shape:
            raise CheckpointError(
                f"{kind} of {region.name} in {self.folder} has shape {list(stored.shape)}, not {list(region.shape)}: "
                "it belongs to another model."
            )
        found = 0
        with torch.no_grad():
            for piece in stored.pieces_near(region):
                common = piece.region.intersect(region)
                if common is not None:
                    reader = self._reader(piece)
                    view = out[common.within(region)]
                    entry = _seen(piece, reader.entries[piece.key])
                    reader.read_entry(entry, piece.slices(common), view.t() if piece.transposed else view)
                    found += common.numel
        assert found == region.numel, (region, found)  # the index has only tensors that their pieces fill exactly

    def carried(self) -> dict[str, bytes]:
        """Tokenizer and other files that a copy of the model takes along: name -> content."""
        return read_carried(self.tokenizer_files)

    def again(self) -> Source:
        """The same model with open files of its own, to read from another thread; close it as well."""
        other = copy.copy(self)
        other._readers = OrderedDict()
        return other

    def close(self) -> None:
        for reader in self._readers.values():
            reader.close()
        self._readers.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def _stored(self, name: str, kind: str) -> StoredTensor:
        stored = self.index.get(kind, {}).get(name)
        if stored is None:
            held = "" if self.index.get(kind) else f" (it holds no {kind} at all)"
            raise CheckpointError(f"{self.folder} has no {kind} of {name}{held}.")
        return stored

    def _reader(self, piece: StoredPiece) -> TensorReader:
        """The open file of a piece, the least recently used one being closed for it where there are too many."""
        reader = self._readers.pop(piece.file, None)
        if reader is None:
            if len(self._readers) >= _OPEN_FILES:
                self._readers.popitem(last=False)[1].close()
            reader = open_file(self.folder / piece.file)
        self._readers[piece.file] = reader
        entry = reader.entries.get(piece.key)
        if entry is None or not piece.fits(entry.shape) or entry.dtype != piece.dtype:
            raise CheckpointError(
                f"{reader.path} does not hold {piece.key} as {MANIFEST if self.manifest else 'it did'} says ({entry}): "
                "it is another save's file."
            )
        return reader


def open_source(path: str | Path) -> Source:
    """Open a folder of Hugging Face's, Meta's or ours, or the newest whole checkpoint of a save folder.

    An `hf://` address is fetched first. Adapters, PEFT's or those of a run, are opened as the model that they make of
    the one they were trained on. Raises CheckpointError that says what was looked for.
    """
    stored = open_stored(path)
    if stored.adapter is None:
        return stored
    from megatron.checkpoint.adapted import with_base  # which makes a source of two

    return with_base(stored)


def open_peft(folder: Path) -> Source:
    """Open the adapters of a folder in PEFT's format as they are; raises CheckpointError."""
    adapter, tensors, files = read_peft(folder)
    return Source(folder, {"weights": tensors}, files, format="peft", model_config={}, adapter=adapter)


def open_stored(path: str | Path) -> Source:
    """As `open_source`, but adapters are opened as they are."""
    folder = local_folder(path)
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise CheckpointError(
            f"{folder} {what}: give the folder of a checkpoint or of a Hugging Face model.{spelling_hint(path)}"
        )
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        check_sizes(folder, manifest)
        weights = manifest.index.get("weights", {})
        weight_files = sorted({piece.file for stored in weights.values() for piece in stored.pieces})
        config, state = read_config(folder), (manifest.state or {}).get("adapter")
        adapter = None if state is None else StoredAdapter.from_state(state, folder / MANIFEST)
        return Source(
            folder,
            manifest.index,
            weight_files,
            format="native",
            model_config=config,
            manifest=manifest,
            adapter=adapter,
        )
    if is_huggingface(folder):
        if is_peft(folder):
            _logger.warning("%s holds adapters beside a model: they are left alone", folder)
        tensors, weight_files = index_huggingface(folder)
        config = read_config(folder)
        family = FAMILIES.get(str(config.get("model_type")))
        if family is not None:
            tensors = with_prefix(tensors, family.prefix, {f"{family.head}.weight"})
        return Source(folder, {"weights": tensors}, weight_files, format="huggingface", model_config=config)
    if is_peft(folder):
        return open_peft(folder)
    if is_meta(folder):
        tensors, weight_files, config = index_meta(folder)
        return Source(folder, {"weights": tensors}, weight_files, format="meta", model_config=config)
    holds_steps = read_pointer(folder) is not None or any(step_of(child.name) is not None for child in folder.iterdir())
    newest = newest_checkpoint(folder) if holds_steps else None
    if newest is not None:  # before the release of Megatron-LLM's that the run may have begun with, in the same folder
        return open_stored(newest)
    found = find_megatron(folder)
    if found is not None:
        index, weight_files, config, state = index_megatron(found)
        return Source(
            found.folder,
            index,
            weight_files,
            format="megatron-llm",
            model_config=config,
            state=state,
            tokenizer_folder=found.root,
        )
    if holds_steps:
        raise CheckpointError(f"{folder} holds no whole checkpoint: every folder in it is incomplete.")
    raise CheckpointError(
        f"{folder} is neither a model nor a checkpoint: looked for {MANIFEST} (a checkpoint), step_… folders (a save "
        f"folder), {SINGLE} and {SHARD_INDEX} or {PICKLE} and {PICKLE_INDEX} (a Hugging Face model), {ADAPTER_CONFIG} "
        f"(PEFT's adapters), {PARAMS} and consolidated.00.pth (Meta's), {LATEST} (Megatron-LLM's)."
    )


def what_makes_it_a_model(folder: Path) -> str | None:
    """The file by which a folder is a model itself and no place for checkpoints; None where there is none."""
    if (folder / MANIFEST).is_file():
        return MANIFEST
    weights = sorted(path.name for ending in ("*.safetensors", "*.bin") for path in folder.glob(ending))
    if weights and (folder / MODEL_CONFIG).is_file():
        return weights[0]
    if is_peft(folder):
        return ADAPTER_CONFIG
    return PARAMS if is_meta(folder) else None


def _read_run_config(path: Path) -> dict[str, Any] | None:
    """The resolved configuration of the run that saved it, None after a conversion."""
    if not path.exists():
        return None
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}).") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} does not hold a configuration.")
    return content
