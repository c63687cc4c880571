"""The flags that say what the model is, how it is trained and in which precision."""

from __future__ import annotations

from megatron.config.megatron_llm.flag import Flag, ignored, implied, key, refused, rule

_SCALE = "fp16 is not offered, so nothing scales the loss; use --bf16"
_DECODER = "models here are decoders alone; leave it out"

MODEL: list[Flag] = [
    rule(
        "model_name",
        "text",
        "the family of a model without --load (`model.model_type`); with it, the checkpoint's must be of that family",
        "llama2",
        choices=("gpt", "llama", "llama2", "codellama", "falcon", "mistral"),
    ),
    *implied("a stack of decoder layers", "text", "model_type", choices=("encoder_or_decoder",)),
    key("num_layers", "model.num_hidden_layers", "whole", "3"),
    key("encoder_num_layers", "model.num_hidden_layers", "whole", "3"),
    *refused(_DECODER, "whole", "decoder_num_layers", "pipeline_model_parallel_split_rank"),
    key("hidden_size", "model.hidden_size", "whole", "96"),
    key("ffn_hidden_size", "model.intermediate_size", "whole", "200"),
    key("num_attention_heads", "model.num_attention_heads", "whole", "8"),
    key("num_attention_heads_kv", "model.num_key_value_heads", "whole", "2"),
    key("kv_channels", "model.head_dim", "whole", "16"),
    rule(
        "max_position_embeddings",
        "whole",
        "`model.max_position_embeddings` without --load; with it the checkpoint's counts, which --seq_length must not "
        "pass",
        "64",
    ),
    *implied(
        "vocabularies are padded to what the ranks can share, and the padding is never learnt or saved",
        "whole",
        "make_vocab_size_divisible_by",
    ),
    rule("layernorm_epsilon", "number", "`model.rms_norm_eps` or `model.layer_norm_eps`", "1e-6"),
    *refused("the residual stream is not that of BERT; leave it out", "switch",
             "apply_residual_connection_post_layernorm"),
    rule("use_bias", "switch", "biases of `gpt`, which always has them; refused for the others"),
    *implied("each family has its norm, Llama and Mistral RMSNorm", "switch", "use_rms_norm"),
    *refused("layers are normalised at their input; leave it out", "switch", "use_post_ln"),
    *refused("nothing here writes ONNX; leave it out", "switch", "onnx_safe"),
    rule("glu_activation", "text", "`swiglu` is Llama's and Mistral's; the others are refused", "swiglu",
         choices=("geglu", "liglu", "reglu", "swiglu")),
    rule("position_embedding_type", "text",
         "with `--model_name gpt` and no --load, `rotary` is `gpt_neox` and `absolute` is `gpt2`; else the family's",
         "rotary", choices=("absolute", "rotary")),
    rule("rope_scaling_factor", "number", "must be that of the checkpoint's config.json, where 1.0 is none", "1.0"),
    key("rope_theta", "model.rope_theta", "number", "1e6"),
    rule("parallel_attn", "switch", "Falcon's layers; refused for other families"),
    rule("parallel_layernorm", "switch", "Falcon's layers; refused for other families"),
    rule("use_multiquery_attn", "switch", "Falcon's one key/value head; refused for other families"),
    rule("no_tie_embed_logits", "switch", "`model.tie_word_embeddings`, true without it and --load"),
    rule("sliding_window_size", "whole", "must be that of the checkpoint's config.json", "4096"),
    rule("init_method_std", "number", "`model.initializer_range` of random weights", "0.01"),
    *refused("weights begin normally distributed, with --init_method_std; leave it out", "switch",
             "init_method_xavier_uniform"),
]  # fmt: skip

_DROPOUT = "models here train without dropout; give 0.0, or leave it out, which means the same here"

OPTIMIZER: list[Flag] = [
    *refused(_DROPOUT, "number", "attention_dropout", "hidden_dropout", neutral=(0.0,)),
    *refused("models here train without dropout; leave it out", "switch", "lima_dropout"),
    key("weight_decay", "optimizer.weight_decay", "number", "0.2"),
    rule("start_weight_decay", "number", "must be the same as --end_weight_decay: the decay is constant", "0.1"),
    rule("end_weight_decay", "number", "must be the same as --start_weight_decay: the decay is constant", "0.1"),
    *refused("weight decay is constant here; leave it out", "text", "weight_decay_incr_style", neutral=("constant",)),
    key("clip_grad", "optimizer.clip_grad", "number", "0.5"),
    key("adam_beta1", "optimizer.beta1", "number", "0.8"),
    key("adam_beta2", "optimizer.beta2", "number", "0.9"),
    key("adam_eps", "optimizer.eps", "number", "1e-6"),
    *ignored("there is no SGD", "number", "sgd_momentum"),
    *refused("AdamW is the optimizer here; use --optimizer adam", "text", "optimizer", neutral=("adam",)),
]

LEARNING_RATE: list[Flag] = [
    key("lr", "optimizer.learning_rate", "number", "2e-5"),
    key("min_lr", "optimizer.min_learning_rate", "number", "1e-6"),
    rule("lr_decay_style", "text", "`optimizer.decay_style`", "cosine",
         choices=("constant", "linear", "cosine", "inverse-square-root")),
    rule("lr_decay_iters", "whole", "`optimizer.decay_steps`", "50"),
    rule("lr_decay_samples", "whole", "`optimizer.decay_steps`, by the batch", "200"),
    rule("lr_warmup_fraction", "number", "`optimizer.warmup_steps`, as a part of the horizon", "0.1"),
    rule("lr_warmup_iters", "whole", "`optimizer.warmup_steps`", "2"),
    rule("lr_warmup_samples", "whole", "`optimizer.warmup_steps`, by the batch", "8"),
    *implied("the configuration counts on resume; what differs is logged", "switch", "override_opt_param_scheduler"),
    rule("use_checkpoint_opt_param_scheduler", "switch", "the schedule of the run's checkpoint replaces the flags'"),
]  # fmt: skip

PRECISION: list[Flag] = [
    rule("bf16", "switch", "`train.precision`: bf16, and fp32 without it"),
    *refused("fp16 is not offered: it needs loss scaling, and bf16 does not; use --bf16", "switch", "fp16"),
    *refused(_SCALE, "number", "loss_scale", "initial_loss_scale", "min_loss_scale", "loss_scale_window", "hysteresis"),
    *refused("the residual stream is as precise as the weights; leave it out", "switch", "fp32_residual_connection"),
    *implied("scores are not divided by the layer's number (which was undone again)", "switch",
             "no_query_key_layer_scaling"),
    *implied("softmax and gradients are fp32", "switch",
             "attention_softmax_in_fp32", "accumulate_allreduce_grads_in_fp32"),
    *refused("the loss is computed in fp32; leave it out", "switch", "fp16_lm_cross_entropy"),
]  # fmt: skip
