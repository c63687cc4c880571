"""The `log` section: what is reported where."""

from __future__ import annotations

from dataclasses import dataclass

from megatron.config.key import key


@dataclass(frozen=True)
class LogConfig:
    """Progress lines on stderr, and files in `dir`: config.yaml and metrics.jsonl; a file STOP there ends the run."""

    interval: int = key(10, "Steps between progress lines and metrics.", minimum=1)
    dir: str | None = key(
        None,
        "Folder for config.yaml and metrics.jsonl; those of another run there are kept as config-1.yaml and "
        "metrics-1.jsonl. null: no files.",
    )
    tensorboard: bool = key(False, "Also write TensorBoard files in log.dir (needs the extra `tensorboard`).")
    wandb_project: str | None = key(None, "Also report to this Weights & Biases project (needs the extra `wandb`).")
    megatron_llm: bool = key(
        False, "Also print Megatron-LLM's log lines on standard output, for programs that read those."
    )
