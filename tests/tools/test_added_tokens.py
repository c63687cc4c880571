"""Megatron-LLM's way to added tokens: its resharder grows the vocabulary, and each script is told the list."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer

from megatron.checkpoint.megatron_llm import find_megatron
from megatron.checkpoint.source import open_source
from megatron.parallel.layout import Region
from tools import checkpoint_util, finetune, hf_to_megatron, megatron_to_hf, preprocess_instruct_data, sft

from .conftest import Tool

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K-untied"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real data in ../shared, which is not there")
SIZE = 512 + 5 + 2  # its own pieces, <CLS> <SEP> <EOD> <MASK> <PAD>, and the two of the chat form
TAGS = '--vocab_extra_ids_list "<|im_start|>,<|im_end|>"'
SENTENCEPIECE = f"--tokenizer_type=SentencePieceTokenizer --vocab_file={STORIES}/tokenizer.model"


def read_head(folder: Path) -> torch.Tensor:
    with open_source(folder) as source:
        shape = source.shapes()["lm_head.weight"]
        head = torch.empty(shape)
        source.read(Region.whole("lm_head.weight", shape), head)
        return head


def test_instruction_tuning_from_growing_to_export(tool: Tool, tmp_path: Path) -> None:
    """examples/parallelize.sh's `--true_vocab_size`, then the guide's commands but for their sizes."""
    w, sharded = tmp_path / "w", tmp_path / "sharded"
    tool(hf_to_megatron, f"llama2 --size=70 --out={w} --cache-dir={tmp_path}/none --model-path={STORIES}")
    grid = "--target_tensor_parallel_size 2 --target_pipeline_parallel_size 1"
    tool(checkpoint_util, f"{grid} --load_dir {w} --save_dir {sharded} --model_type llama2 --true_vocab_size {SIZE}")
    before = read_head(sharded)
    assert before.shape[0] == SIZE and torch.equal(before[:512], read_head(STORIES))
    assert torch.equal(before[512:], before[511:512].expand(SIZE - 512, -1)), "copies of the last row"
    data = tmp_path / "data.jsonl"
    lines = [{"question": f"Is {number} high?", "response": "yes", "system_prompt": "Say."} for number in range(6)]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines))
    tool(
        preprocess_instruct_data,
        f"--input={data} --output_prefix={tmp_path}/orca {SENTENCEPIECE} --chunk_size=32 --workers=1 {TAGS} "
        "--question_key=question --answer_key=response --system_key=system_prompt",
    )
    tool(
        finetune,
        f"--tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 --load {sharded} --save {sharded} "
        f"--tensorboard_dir {sharded}/tensorboard/ --data_path {tmp_path}/orca --model_name llama2 {SENTENCEPIECE} "
        "--use_flash_attn --micro_batch_size 2 --global_batch_size 4 --sequence_parallel --recompute_granularity "
        f"selective --use_checkpoint_args --data_type instruction --variable_seq_lengths {TAGS} --hidden_dropout 0.0 "
        "--attention_dropout 0.0 --no_bias_gelu_fusion --log_interval 1 --save_interval 100 --eval_interval 50 "
        "--train_iters 2 --lr_decay_style cosine --lr_warmup_iters 1 --lr 1e-2 --min_lr 1e-3 --use_rms_norm "
        "--glu_activation swiglu --no_tie_embed_logits --layernorm_epsilon 1e-5 --split 100,0,0",
    )
    tool(megatron_to_hf, f"--input_dir={sharded} --output_dir={tmp_path}/hf {SENTENCEPIECE.split()[1]} {TAGS} "
         "--override_special_tokens eos=<|im_end|> pad=<PAD>")  # fmt: skip
    after = read_head(tmp_path / "hf")
    assert after.shape == before.shape and not torch.equal(after[517], after[518]), "the tags learnt"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert tokenizer.convert_tokens_to_ids(["<PAD>", "<|im_start|>", "<|im_end|>"]) == [516, 517, 518]
    for file in ("config.json", "generation_config.json"):
        content = json.loads((tmp_path / "hf" / file).read_text())
        assert [content[f"{name}_token_id"] for name in ("bos", "eos", "pad")] == [1, 518, 516]


def test_padding_of_a_resharded_checkpoint_is_left_out(tool: Tool, tmp_path: Path) -> None:
    """Theirs knows its padded size alone, and is told the true one; ours knows it, and loses no token by a slip."""
    w, grown, plain = tmp_path / "w", tmp_path / "grown", tmp_path / "plain"
    tool(hf_to_megatron, f"llama2 --out={w} --cache-dir={STORIES}")
    words = "--load_dir {} --save_dir {} --model_type llama2 --target_tensor_parallel_size 2"
    tool(checkpoint_util, f"{words.format(w, grown)} --true_vocab_size {SIZE}")
    said = tool(checkpoint_util, f"{words.format(grown, plain)} --true_vocab_size 512", code=2)
    assert f"holds {SIZE} tokens without padding, and the last 7 would be lost" in said and not plain.exists()
    (grown / "config.json").unlink()
    found = find_megatron(grown)
    assert found is not None
    for file in found.files.values():
        content = torch.load(file, weights_only=False)
        del content["args"].true_vocab_size
        torch.save(content, file)
    tool(checkpoint_util, f"{words.format(grown, tmp_path / 'padded')}")
    padded = read_head(tmp_path / "padded")
    assert padded.shape[0] == 768
    tool(checkpoint_util, f"{words.format(grown, plain)} --true_vocab_size {SIZE}")
    assert torch.equal(read_head(plain), padded[:SIZE])


def test_files_of_an_export(tool: Tool, tmp_path: Path) -> None:
    for count in (1, 2, 3):
        tool(megatron_to_hf, f"--input_dir {STORIES} --output_dir {tmp_path}/{count} --num_output_shards {count}")
        assert len(list((tmp_path / str(count)).glob("*.safetensors"))) == count
    assert "at least 1" in tool(megatron_to_hf, f"--input_dir {STORIES} --output_dir o --num_output_shards 0", code=2)


def test_meditrons_fine_tuning_on_four_machines(tmp_path: Path) -> None:
    """The documented line of sft.py: what each machine starts."""
    arguments = sft.parse(
        shlex.split(
            "--checkpoint=baseline --size=70 --run_name=cotmedqa --data /path/to/medqa_cot_train.jsonl --val "
            "/path/to/medqa_cot_validation.jsonl --micro_batch=4 --nodes=4 --addr=node0 --save_interval=200 --pp=4 "
            "--seq 4096 --rank=3"
        )
    )
    words = sft.training_command(arguments, STORIES, [tmp_path / "t", tmp_path / "v"], [10178, 640], 480)
    line = " ".join(words)
    assert "--nproc_per_node=8 --nnodes=4 --node_rank=3 --master_addr=node0" in line
    assert "--tensor_model_parallel_size 8 --pipeline_model_parallel_size 4" in line
    assert "--seq_length 4096 --bf16 --global_batch_size 64 --micro_batch_size 4 --train_iters 480" in line
    assert "--save_interval 200" in line and "--eval_iters 10" in line
