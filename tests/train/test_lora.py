"""Runs that train adapters: what they keep in memory and in checkpoints, what they resume from, what they refuse."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from megatron.checkpoint.adapted import open_adapter
from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source
from megatron.checkpoint.weights import load_weights
from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.lora import LoraConfig
from megatron.config.model import ModelSettings
from megatron.config.optimizer import OptimizerConfig
from megatron.config.run import RunConfig
from megatron.config.train import TrainConfig
from megatron.model.lora import adapter_of, make_lora
from megatron.model.specs import count_adapters
from megatron.model.transformer import Transformer
from megatron.parallel.layout import Region
from megatron.parallel.mesh import Axis, single_rank
from megatron.parallel.world import World
from megatron.train.build import build_trainer
from megatron.train.trainer import Trainer
from megatron.utils.environment import Launch
from megatron.utils.errors import CheckpointError, ConfigError

from .conftest import MODEL, random_batch


def config_of(folder: Path, base: Path, steps: int = 4, **sections: Any) -> RunConfig:
    """A run in `folder` that saves at every other step."""
    settings: dict[str, Any] = {
        "model": ModelSettings(init_from=str(base)),
        "lora": LoraConfig(rank=3, alpha=6.0, targets=("q_proj", "v_proj", "down_proj")),
        "data": DataConfig(train="synthetic", sequence_length=8),
        "optimizer": OptimizerConfig(learning_rate=1e-2, warmup_steps=0, decay_style="constant"),
        "train": TrainConfig(steps=steps, global_batch=2, precision="bf16"),
        "checkpoint": CheckpointConfig(save=str(folder), interval=2),
        **sections,
    }
    return RunConfig(**settings)


def fit(config: RunConfig, world: World) -> Trainer:
    with build_trainer(config, world) as trainer:
        trainer.fit()
    return trainer


def stored(folder: Path) -> dict[str, torch.Tensor]:
    """Everything of every kind in a checkpoint, by kind and name."""
    with open_adapter(folder) as source:
        found = {}
        for kind in source.index:
            for name, shape in source.shapes(kind).items():
                found[f"{kind} {name}"] = torch.empty(shape, dtype=source.dtype(name, kind))
                source.read(Region.whole(name, shape), found[f"{kind} {name}"], kind)
    return found


def weights(folder: Path) -> dict[str, torch.Tensor]:
    """The weights of a model in float32."""
    with open_source(folder) as source:
        found = {name: torch.empty(shape) for name, shape in source.shapes().items()}
        for name, out in found.items():
            source.read(Region.whole(name, tuple(out.shape)), out)
    return found


@dataclass(frozen=True)
class Finished:
    """A run of four steps that saved after two of them. Not to be changed."""

    base: Path
    save: Path
    config: RunConfig
    trainer: Trainer


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Finished:
    folder = tmp_path_factory.mktemp("finished")
    make_model(folder / "base", seed=1)
    config = config_of(folder / "save", folder / "base")
    world = World(Launch(), torch.device("cpu"), Axis("control"))
    return Finished(folder / "base", folder / "save", config, fit(config, world))


def make_model(folder: Path, seed: int) -> None:
    torch.manual_seed(seed)
    LlamaForCausalLM(LlamaConfig(**MODEL.to_huggingface())).save_pretrained(folder)


@pytest.fixture
def half(finished: Finished, tmp_path: Path) -> Path:
    """A save folder in which the run has come to step 2."""
    shutil.copytree(finished.save / "step_0000002", tmp_path / "half" / "step_0000002")
    return tmp_path / "half"


def test_only_adapters_are_trained_kept_and_saved(finished: Finished) -> None:
    before, step = weights(finished.base), finished.trainer.step
    names = {name for name, parameter in step.model.named_parameters() if parameter.requires_grad}
    trained = sum(parameter.numel() for parameter in step.model.parameters() if parameter.requires_grad)
    assert names and all("adapter" in name for name in names)
    assert trained == count_adapters(MODEL, make_lora(finished.config.lora, MODEL))
    # Masters and two moments in float32 for what is trained, whose buffers end at even places; nothing for the rest.
    state = [bucket.gradients.numel() for bucket in step.buckets]
    assert trained <= sum(state) <= trained + 64 * (len(names) + 1)
    assert step.optimizer.state_bytes == 3 * 4 * sum(state)
    frozen = {region.name: view for flat in step.frozen for region, view in flat.owned_regions(flat.owned_weights)}
    assert frozen.keys() == before.keys()
    for flat in step.frozen:
        for slot in flat.slots:
            assert slot.parameter.grad is None and not slot.parameter.requires_grad
            for region, view in slot.spec.regions(slot.parameter):
                assert torch.equal(view, before[region.name][region.slices].bfloat16()), region
    files = [path for path in (finished.save / "step_0000004").iterdir() if path.suffix == ".safetensors"]
    assert sum(path.stat().st_size for path in files) < 14 * trained + 4 * 8192
    assert all(adapter_of(name.split()[1]) is not None for name in stored(finished.save))


def test_a_resumed_run_goes_on_to_the_same_bits(world: World, finished: Finished, half: Path, tmp_path: Path) -> None:
    """Also when the model has moved: its path is told."""
    moved = tmp_path / "moved"
    shutil.copytree(finished.base, moved)
    describe(half, base=str(tmp_path / "nowhere"))
    with pytest.raises(CheckpointError, match=r"cannot be opened.*Name it as model.init_from"):
        fit(config_of(half, moved, model=ModelSettings()), world)
    fit(config_of(half, moved), world)
    expected, found = stored(finished.save), stored(half)
    assert expected.keys() == found.keys() and len(expected) == 4 * 2 * 3 * MODEL.num_hidden_layers
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    assert any(tensor.abs().max() > 0 for name, tensor in expected.items() if "lora_B" in name)


def describe(save: Path, **changed: Any) -> None:
    """Change what the checkpoint of step 2 says of its adapters."""
    path = save / "step_0000002" / "checkpoint.json"
    content = json.loads(path.read_text())
    content["state"]["adapter"].update(changed)
    path.write_text(json.dumps(content))


def test_a_run_begins_with_the_adapters_of_another(world: World, finished: Finished, tmp_path: Path) -> None:
    """From a checkpoint and from the same in PEFT's format: what is written at once is what was read."""
    base, save = finished.base, finished.save
    convert(save, tmp_path / "wide", to="peft", dtype=torch.float32)
    check_peft_reads(tmp_path / "wide", base, save)
    expected = {name: tensor for name, tensor in stored(save).items() if name.startswith("weights")}
    for number, first in enumerate((save, tmp_path / "wide")):
        again = tmp_path / f"again-{number}"
        still = OptimizerConfig(learning_rate=1e-12, warmup_steps=0, decay_style="constant")
        fit(config_of(again, base, 1, lora=LoraConfig(init_from=str(first)), optimizer=still), world)
        found = stored(again)
        assert all(torch.equal(found[name], tensor) for name, tensor in expected.items()), first


def check_peft_reads(adapter: Path, base: Path, run: Path) -> None:
    """PEFT computes from what was written what the run computes."""
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    ours = Transformer(MODEL, single_rank())
    with open_source(run) as source:
        load_weights(ours, source)
    tokens = random_batch(1)[0].tokens
    with torch.no_grad():
        difference = (ours(tokens).transpose(0, 1)[..., : MODEL.vocab_size] - model(tokens).logits).abs().max()
    assert difference <= 1e-6
    stated = json.loads((adapter / "adapter_config.json").read_text())
    assert stated["base_model_name_or_path"] == str(base)
    assert (stated["r"], stated["lora_alpha"], stated["target_modules"]) == (3, 6, ["q_proj", "v_proj", "down_proj"])


def test_the_model_that_adapters_make_is_read_like_any_other(world: World, finished: Finished, tmp_path: Path) -> None:
    before, after, parts = weights(finished.base), weights(finished.save), stored(finished.save)
    for name, tensor in before.items():
        layer = name.removesuffix(".weight")
        if f"weights {layer}.lora_A.weight" in parts:
            down, up = (parts[f"weights {layer}.lora_{part}.weight"].float() for part in "AB")
            tensor = tensor + 6.0 / 3 * (up @ down)
            assert not torch.equal(after[name], before[name]), name
        assert (after[name] - tensor).abs().max() <= 1e-6, name
    convert(finished.save, tmp_path / "merged")
    assert all(torch.equal(weights(tmp_path / "merged")[name], tensor) for name, tensor in after.items())
    # A run of all weights begins with it.
    fit(config_of(tmp_path / "further", finished.save, 1, lora=LoraConfig()), world)


def test_another_model_is_refused(world: World, finished: Finished, half: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    make_model(other, seed=2)
    for attempt in (
        lambda: fit(config_of(half, other), world),
        lambda: convert(other, tmp_path / "merged", adapter=half),
        lambda: fit(config_of(tmp_path / "new", other, lora=LoraConfig(init_from=str(half))), world),
    ):
        with pytest.raises(CheckpointError, match="not the model that the adapters in"):
            attempt()
    convert(finished.base, tmp_path / "native")
    fit(config_of(half, tmp_path / "native", 3), world)  # the same values in another format


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "no adapters": ({"lora": LoraConfig()}, "lora.rank=0: set lora.rank=3"),
    "another rank": ({"lora": LoraConfig(rank=4)}, "lora.rank=4 but there it is 3"),
    "another alpha": ({"lora": LoraConfig(rank=3, alpha=5.0)}, "lora.alpha=5.0 but there it is 6.0"),
    "other layers": ({"lora": LoraConfig(rank=3, targets=("q_proj",))}, "lora.targets=self_attn.q_proj but there"),
    "another scale": ({"lora": LoraConfig(rank=3, rslora=True)}, "lora.rslora=true but there it is false"),
}


def test_contradictions_are_refused(world: World, finished: Finished, half: Path, tmp_path: Path) -> None:
    for changed, message in REFUSED.values():
        with pytest.raises(ConfigError, match=message):
            fit(config_of(half, finished.base, **changed), world)
    plain = tmp_path / "plain"
    fit(config_of(plain, finished.base, 1, lora=LoraConfig()), world)
    with pytest.raises(ConfigError, match="is a run without adapters"):
        fit(config_of(plain, finished.base), world)
    with pytest.raises(CheckpointError, match="holds a model and no adapters"):
        fit(config_of(tmp_path / "new", finished.base, lora=LoraConfig(init_from=str(plain))), world)
    shape = {name: getattr(MODEL, name) for name in ("vocab_size", "hidden_size", "intermediate_size")}
    layers = {name: getattr(MODEL, name) for name in ("num_hidden_layers", "num_attention_heads")}
    with pytest.raises(ConfigError, match=r"there is none: name it as model\.init_from"):
        fit(config_of(tmp_path / "random", finished.base, model=ModelSettings(**shape, **layers)), world)


@pytest.mark.parametrize("damage", [{"rank": "three"}, {"rank": 5}, {"base": None}], ids=str)
def test_a_damaged_description_is_an_error(half: Path, damage: dict[str, Any]) -> None:
    describe(half, **damage)
    with pytest.raises(CheckpointError, match=str(half)):
        weights(half)
