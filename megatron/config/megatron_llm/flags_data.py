"""The flags of data, evaluation, logging, and those of programs that are not here."""

from __future__ import annotations

from megatron.config.megatron_llm.flag import Flag, ignored, implied, key, refused, rule

_MASKED = "models here predict the next token, and no masked ones; leave it out"
_DECODER = "models here are decoders alone; leave it out"
_WANDB = "handed to wandb as its environment variable"

DATA: list[Flag] = [
    rule("eval_only", "switch", "`megatron evaluate` on the test data, all of it"),
    rule("eval_iters", "whole", "`evaluate.batches`; 0 is no evaluation", "3"),
    rule("eval_interval", "whole", "`evaluate.interval`, where there is validation data", "5"),
    rule("data_path", "words", "`data.train` with `data.split`: a prefix, or weights and prefixes", "0.3 a 0.7 b"),
    rule("split", "text", "`data.split`; without it 969, 30, 1", "90,10,0"),
    rule("train_data_path", "words", "`data.train`, all of it", "a"),
    rule("valid_data_path", "words", "`data.validation`", "b"),
    rule("test_data_path", "words", "`data.test`, or what --eval_only evaluates", "c"),
    *refused("only the memory-mapped format is read; tokenize again with tools/preprocess_data.py", "text", "data_impl",
             neutral=("infer", "mmap")),
    *implied("the system reads ahead", "switch", "mmap_warmup"),
    *implied("samples are read beside the step, without processes of their own", "whole", "num_workers"),
    key("seq_length", "data.sequence_length", "whole", "16"),
    key("encoder_seq_length", "data.sequence_length", "whole", "16"),
    *refused(_DECODER, "whole", "decoder_seq_length", "retriever_seq_length"),
    *implied("conversations are padded to the longest of their micro-batch, packed samples not at all", "switch",
             "variable_seq_lengths"),
    rule("data_type", "text", "`data.kind`: gpt is pretraining", "instruction", choices=("gpt", "instruction")),
    rule("scalar_loss_mask", "number", "`data.prompt_loss_weight` of conversations", "0.5"),
    rule("vocab_file", "text", "`tokenizer.path`, for all kinds of tokenizer; without it the checkpoint's", "t.model"),
    *implied("the file beside the vocabulary", "text", "merge_file"),
    rule("tokenizer_type", "text", "what --vocab_file is; BERT's are refused", "SentencePieceTokenizer",
         choices=("SentencePieceTokenizer", "GPT2BPETokenizer", "FalconTokenizer", "BertWordPieceLowerCase",
                  "BertWordPieceCase")),
    rule("tokenizer_model", "text", "as --vocab_file", "t.model"),
    rule("vocab_extra_ids", "whole", "must be what the data was tokenized with", "2"),
    rule("vocab_extra_ids_list", "text", "must be what the data was tokenized with", "[bib],[/bib]"),
    rule("no_new_tokens", "switch", "must be what the data was tokenized with"),
    rule("reset_attention_mask", "switch", "`data.document_mask`, which counts positions anew as well"),
    rule("reset_position_ids", "switch", "with --reset_attention_mask alone"),
    *refused("the loss of each document's first token is kept (under --reset_attention_mask too); leave it out",
             "switch", "eod_mask_loss"),
    *refused(_MASKED, "number", "sample_rate", "mask_prob", "short_seq_prob"),
    *ignored("each order here is divided among the ranks in its own way", "switch", "no_data_sharding"),
]  # fmt: skip

LOGGING: list[Flag] = [
    *ignored("it is not computed, so its field is left out", "switch", "log_params_norm", "log_num_zeros_in_grad"),
    *ignored("there are no timers within a step", "whole", "timing_log_level"),
    *implied("there are no timers within a step", "text", "timing_log_option", choices=("max", "minmax", "all")),
    *implied("there are no timers within a step", "switch", "barrier_with_L1_time", "log_timers_to_tensorboard"),
    *implied("TensorBoard gets figures when they are logged", "whole",
             "tensorboard_log_interval", "tensorboard_queue_size"),
    *implied("every figure goes to every sink", "switch", "log_batch_size_to_tensorboard",
             "log_validation_ppl_to_tensorboard", "log_memory_to_tensorboard", "log_world_size_to_tensorboard",
             "log_learning_rate_to_tensorboard", "log_loss_scale_to_tensorboard"),
    rule("wandb_logger", "switch", "`log.wandb_project`, and no TensorBoard"),
    rule("wandb_project", "text", "`log.wandb_project`, with --wandb_logger", "medical"),
    *[rule(f"wandb_{name}", "text", f"{_WANDB} {variable}", "x") for name, variable in
      (("entity", "WANDB_ENTITY"), ("name", "WANDB_NAME"), ("id", "WANDB_RUN_ID"), ("resume", "WANDB_RESUME"))],
    *refused("a key on the command line can be seen by everyone; set WANDB_API_KEY", "text", "wandb_api_key"),
    rule("metrics", "words", "`evaluate.metrics`", "accuracy",
         choices=("perplexity", "accuracy", "instruct_accuracy", "count_loss_mask", "count_instruct_mask", "all")),
]  # fmt: skip

_SERVER = "it is an option of their text server, not of training; leave it out"
_FP8 = "FP8 could not be proven right without a GPU, and unproven it is not offered; use --bf16"
_SCHEDULER = "it talks to a scheduler that NVIDIA alone has; use SIGTERM, which saves and exits"
_RETRIEVAL = "there are no retrieval models; leave it out"
_VISION = "there are no vision models; leave it out"

LEGACY: list[Flag] = [
    *refused(_SERVER, "number", "inference_batch_times_seqlen_threshold", "max_tokens_to_oom", "temperature", "top_p",
             "top_k", "out_seq_length"),
    *refused(_FP8, "switch", "fp8_e4m3", "fp8_hybrid", "no_fp8_wgrad"),
    *refused(_FP8, "text", "fp8_margin", "fp8_interval", "fp8_amax_history_len", "fp8_amax_compute_algo"),
    *refused(_FP8, "text", "transformer_impl", neutral=("local",)),
    *refused(_SCHEDULER, "switch", "adlr_autoresume"),
    *refused(_SCHEDULER, "whole", "adlr_autoresume_interval"),
    *refused(_RETRIEVAL, "text", "ict_head_size", "biencoder_projection_dim", "ict_load", "bert_load",
             "titles_data_path", "query_in_block_prob", "evidence_data_path", "block_data_path", "embedding_path",
             "indexer_batch_size", "indexer_log_interval"),
    *refused(_RETRIEVAL, "words", "retriever_report_topk_accuracies"),
    *refused(_RETRIEVAL, "switch", "biencoder_shared_query_context_model", "use_one_sent_docs",
             "retriever_score_scaling"),
    *refused(_VISION, "text", "num_classes", "img_h", "img_w", "num_channels", "patch_dim", "classes_fraction",
             "data_per_class_fraction", "head_lr_mult", "iter_per_epoch", "dino_local_img_size",
             "dino_local_crops_number", "dino_head_hidden_size", "dino_bottleneck_size", "dino_freeze_last_layer",
             "dino_warmup_teacher_temp", "dino_teacher_temp", "dino_warmup_teacher_temp_epochs"),
    *refused(_VISION, "switch", "dino_norm_last_layer"),
]  # fmt: skip
