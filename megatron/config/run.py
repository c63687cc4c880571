"""The whole configuration of a run. Only `train`, the commands and what stands above them may know it."""

from __future__ import annotations

from dataclasses import dataclass, field

from megatron.config.checkpoint import CheckpointConfig
from megatron.config.data import DataConfig
from megatron.config.evaluate import EvaluateConfig
from megatron.config.kernels import KernelsConfig
from megatron.config.log import LogConfig
from megatron.config.lora import LoraConfig
from megatron.config.model import ModelSettings
from megatron.config.optimizer import OptimizerConfig
from megatron.config.parallel import ParallelConfig
from megatron.config.tokenizer import TokenizerConfig
from megatron.config.train import TrainConfig


@dataclass(frozen=True)
class RunConfig:
    """Every section, each a frozen dataclass of its own module. Nothing changes a configuration once it is loaded."""

    model: ModelSettings = field(default_factory=ModelSettings)
    lora: LoraConfig = field(default_factory=LoraConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    kernels: KernelsConfig = field(default_factory=KernelsConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    log: LogConfig = field(default_factory=LogConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
