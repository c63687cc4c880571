"""The flags of the training loop, of checkpoints and of the processes."""

from __future__ import annotations

from megatron.config.megatron_llm.flag import Flag, ignored, implied, key, refused, rule

_KERNELS = "the compiled kernels are used where they are there; `kernels.backend` chooses"
_FULL = "with --recompute_granularity full"

TRAINING: list[Flag] = [
    key("micro_batch_size", "train.micro_batch", "whole", "2"),
    rule("global_batch_size", "whole", "`train.global_batch`; without it one micro batch per data rank", "8"),
    rule("rampup_batch_size", "wholes", "`train.global_batch` as a ramp (start, increment, samples)", "4 2 16"),
    rule("train_iters", "whole", "`train.steps`", "20"),
    rule("train_samples", "whole", "`train.steps`, by the batch", "80"),
    *refused("every step is trained on (one whose gradient is not finite skips its update by itself); leave it out",
             "wholes", "skip_iters", neutral=((),)),
    rule("recompute_activations", "switch", "as `--recompute_granularity selective`"),
    rule("recompute_granularity", "text",
         "`full` is `train.recompute`; `selective` (attention alone) is what always is: no attention here keeps its "
         "scores", "full", choices=("full", "selective")),
    rule("recompute_method", "text", f"{_FULL}: uniform is all layers, block the first ones of each stage", "block",
         choices=("uniform", "block")),
    rule("recompute_num_layers", "whole", f"{_FULL} and block: `train.recompute_layers`", "2"),
    *implied("under sequence parallelism saved activations are divided", "switch", "distribute_saved_activations"),
    key("log_interval", "log.interval", "whole", "5"),
    key("exit_interval", "train.exit_interval", "whole", "50"),
    key("exit_duration_in_mins", "train.exit_minutes", "number", "230"),
    *implied("SIGTERM and SIGINT save and exit", "switch", "exit_signal_handler"),
    rule("tensorboard_dir", "text",
         "`log.dir`, and `log.tensorboard` unless --wandb_logger is given; there are their tags", "tb"),
    *implied(_KERNELS, "switch", "no_masked_softmax_fusion", "no_bias_gelu_fusion", "no_bias_dropout_fusion",
             "use_flash_attn", "no_persist_layer_norm", "no_gradient_accumulation_fusion"),
    rule("dataloader_type", "text", "`data.order`: single is megatron, cyclic is stable (another order than theirs)",
         "cyclic", choices=("single", "cyclic")),
    *implied("messages run behind the computation where that is possible", "switch",
             "no_async_tensor_model_parallel_allreduce"),
    rule("sequence_parallel", "switch", "`parallel.sequence`, off where there is one tensor rank"),
    rule("seed", "whole", "`train.seed` and `data.seed`; random weights differ from Megatron-LLM's", "7"),
    *refused("data ranks begin with equal weights; leave it out", "switch", "data_parallel_random_init"),
]  # fmt: skip

CHECKPOINTS: list[Flag] = [
    key("save", "checkpoint.save", "text", "out"),
    key("save_interval", "checkpoint.interval", "whole", "10"),
    *refused("a run's checkpoints hold the optimizer, so that it can go on; tools/megatron_to_hf.py writes the weights "
             "alone", "switch", "no_save_optim"),
    *implied("there is no random state in a run: the position in the data says all", "switch",
             "no_save_rng", "no_load_rng"),
    rule("load", "text",
         "`checkpoint.load` where the folder holds a run of ours, `model.init_from` where it holds weights (Hugging "
         "Face's, Meta's, Megatron-LLM's or ours)", "model"),
    rule("load_iters", "whole", "the checkpoint of that step in --load; 0 is a release", "20"),
    rule("no_load_optim", "switch", "no more than --finetune says, where --load holds a run: give that"),
    rule("finetune", "switch", "--load becomes `model.init_from`: weights alone, step 0"),
    *implied("weights are not initialised before they are loaded", "switch", "no_initialization"),
    *implied("the architecture is the checkpoint's; a flag that contradicts it is an error", "switch",
             "use_checkpoint_args"),
]  # fmt: skip

DISTRIBUTED: list[Flag] = [
    key("tensor_model_parallel_size", "parallel.tensor", "whole", "2"),
    key("pipeline_model_parallel_size", "parallel.pipeline", "whole", "2"),
    rule("num_layers_per_virtual_pipeline_stage", "whole",
         "`parallel.chunks`, and `parallel.schedule` interleaved", "1"),
    *implied("NCCL on GPUs, gloo on CPUs", "text", "distributed_backend", choices=("nccl", "gloo")),
    *implied("gradients lie in flat buckets of our own", "text", "DDP_impl", choices=("local", "torch")),
    *refused("gradients always lie in flat buckets; leave it out", "switch", "no_contiguous_buffers_in_local_ddp"),
    *implied("activations between stages are divided under sequence parallelism", "switch",
             "no_scatter_gather_tensors_in_pipeline"),
    *refused("it needs a build of torch of their own; leave it out", "switch", "use_ring_exchange_p2p"),
    *implied("torchrun says it in the environment", "whole", "local_rank"),
    *implied("weights are made where they stay", "switch", "use_cpu_initialization"),
    *ignored("memory stays with torch's allocator", "whole", "empty_unused_memory_level"),
    *refused("give the first stage fewer layers with parallel.layers of `megatron train`; leave it out", "switch",
             "standalone_embedding_stage"),
    rule("use_distributed_optimizer", "switch", "`parallel.zero`: 1, and 0 without it"),
]  # fmt: skip
