"""The `lora` section: small adapters that are trained in place of the model's weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from megatron.config.key import key

TargetName = Literal[
    "q_proj",
    "k_proj",
    "v_proj",
    "o_proj",
    "gate_proj",
    "up_proj",
    "down_proj",
    "query_key_value",
    "dense",
    "dense_h_to_4h",
    "dense_4h_to_h",
    "c_attn",
    "c_proj",
    "c_fc",
]


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of low rank (LoRA) for the linear layers of `model.init_from`, whose own weights stay as they are. See
    docs/lora.md."""

    rank: int = key(0, "Rank of the adapters. 0: none, all weights are trained; with `init_from`: as there.", minimum=0)
    alpha: float | None = key(
        None, "The adapters' product counts alpha / rank times. null: once; with `init_from`: as there.", above=0.0
    )
    rslora: bool | None = key(
        None, "Whether it counts alpha / sqrt(rank) times instead. null: no; with `init_from`: as there."
    )
    targets: tuple[TargetName, ...] | None = key(
        None,
        "Which linear layers have adapters, by Hugging Face's names: those that the model's family has. "
        "null: all within a layer; with `init_from`: as there.",
    )
    init_from: str | None = key(
        None,
        "Adapters to begin with: a folder in the format of PEFT, or a checkpoint of a run with adapters. "
        "null: such that nothing changes at first.",
    )

    @property
    def active(self) -> bool:
        """Whether adapters are trained."""
        return self.rank > 0 or self.init_from is not None


def lora_problems(lora: LoraConfig) -> Iterator[tuple[tuple[str, ...], str]]:
    """(keys, what is wrong) of every broken rule between keys of the section."""
    if lora.targets == ():
        yield ("lora.targets",), "lora.targets=[] leaves no layer to adapt; name some, or leave it out for all"
    stated = {"alpha": lora.alpha, "rslora": lora.rslora, "targets": lora.targets}
    for name, value in stated.items():
        if value is not None and not lora.active:
            shown = f"[{', '.join(value)}]" if isinstance(value, tuple) else str(value).lower()
            yield (
                (f"lora.{name}", "lora.rank"),
                f"lora.{name}={shown} with lora.rank=0: there are no adapters; set lora.rank, or leave lora.{name} out",
            )
