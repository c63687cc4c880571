"""Megatron-LLM's tools for weights and Meditron's sft.py: their documented command lines, one after the other."""

from __future__ import annotations

import json
import os
import shlex
import shutil
from pathlib import Path

import pytest

from megatron.__main__ import main
from megatron.checkpoint.manager import whole_checkpoints
from megatron.utils.errors import ConfigError
from megatron.verify import logits
from tools import checkpoint_util, finetune, hf_to_megatron, megatron_to_hf, sft, verify_correctness

from .conftest import Tool

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K-untied"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real data in ../shared, which is not there")
TEXT = "Once upon a time there was a little girl. She liked to play with her dog in the park every day. " * 4


def same(first: Path, second: Path) -> bool:
    return main(["diff", str(first), str(second)]) == 0


def test_getting_started_from_hugging_face_and_back(tool: Tool, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    said = tool(hf_to_megatron, f"llama2 --size=7 --out={tmp_path}/w --cache-dir={STORIES}")
    assert "--size 7:" in said and (tmp_path / "w/latest_checkpointed_iteration.txt").read_text() == "release"
    said = tool(
        verify_correctness,
        f"--model_name=llama2 --model_size=7 --load={tmp_path}/w --data_path={text} "
        f"--tokenizer_type=SentencePieceTokenizer --vocab_file={tmp_path}/w/tokenizer.model "
        f"--huggingface_cache={STORIES} --huggingface_device=cuda:1 --hidden_dropout 0.0 --attention_dropout 0.0 "
        "--no_bias_gelu_fusion --use_rms_norm --glu_activation swiglu --no_tie_embed_logits --no_new_tokens "
        "--layernorm_epsilon 1e-5 --seq_length 48 --train_iters 2",
    )
    assert "equal to transformers: logits of 2 batches" in said and "NOT" not in said
    tool(
        checkpoint_util,
        f"--target_tensor_parallel_size 2 --target_pipeline_parallel_size 1 --load_dir {tmp_path}/w/ "
        f"--save_dir {tmp_path}/sharded/ --model_type llama2 --true_vocab_size 512",
    )
    assert sorted(path.name for path in (tmp_path / "sharded/release").iterdir()) == ["mp_rank_00", "mp_rank_01"]
    said = tool(finetune, training(tmp_path / "sharded", text, tmp_path))
    assert "training starts at step 0" in said and whole_checkpoints(tmp_path / "sharded")[-1][0] == 1
    tool(
        checkpoint_util,
        f"--target_tensor_parallel_size 1 --target_pipeline_parallel_size 1 --load_dir {tmp_path}/sharded/ "
        f"--save_dir {tmp_path}/unsharded --model_type llama2 --true_vocab_size 512",
    )
    tool(megatron_to_hf, f"--input_dir={tmp_path}/unsharded --output_dir={tmp_path}/hf")
    assert same(tmp_path / "hf", whole_checkpoints(tmp_path / "sharded")[-1][1]), "what was trained, not the release"
    tool(checkpoint_util, f"--load_dir {tmp_path}/sharded --save_dir {tmp_path}/r --model_type llama2 --load_iters 0")
    assert same(tmp_path / "r", STORIES)


def training(folder: Path, text: Path, tmp_path: Path) -> str:
    """Training that saves beside the release that it begins with, as the guide has it."""
    from megatron.data.indexed import IndexedWriter

    with IndexedWriter(tmp_path / "data", "uint16") as writer:
        for _ in range(20):
            writer.add_sequence(range(3, 60))
            writer.end_document()
    return (
        f"--load {folder} --save {folder} --data_path {tmp_path}/data --vocab_file {folder}/tokenizer.model "
        "--tokenizer_type SentencePieceTokenizer --no_new_tokens --micro_batch_size 1 --global_batch_size 2 --lr 1e-2 "
        "--lr_decay_style constant --train_iters 1 --save_interval 5 --eval_iters 0 --seq_length 16"
    )


def test_the_tokenizer_of_an_export(tool: Tool, tmp_path: Path) -> None:
    vocabulary = f"--vocab_file {STORIES}/tokenizer.model"
    line = f"--input_dir {STORIES} --output_dir {tmp_path}/hf {vocabulary}"
    said = tool(megatron_to_hf, f"{line} --vocab_extra_ids_list [bib],[/bib]", code=2)
    assert "with 7 added tokens has 519 tokens, the model 512" in said and not (tmp_path / "hf").exists()
    assert "give key=token" in tool(megatron_to_hf, f"{line} --override_special_tokens par=x", code=2)
    tool(megatron_to_hf, f"{line} --num_output_shards 2 --override_special_tokens pad=<unk> eos=</s>")
    names = json.loads((tmp_path / "hf/special_tokens_map.json").read_text())
    assert names == {"pad_token": "<unk>", "eos_token": "</s>"}


@pytest.mark.parametrize(
    ("module", "line", "said"),
    [
        (checkpoint_util, "--load_dir {s} --save_dir {t}/o --model_type llama2 --true_vocab_size 99", "512 tokens"),
        (checkpoint_util, "--load_dir {s} --save_dir {t}/o --model_type BERT", "no masked ones"),
        (checkpoint_util, "--load_dir {s} --save_dir {t}/o --model_type GPT --load_iters 3", "holds none of"),
        (checkpoint_util, "--load_dirs {s}", "did you mean --load_dir?"),
        (hf_to_megatron, "mistral --out {t}/o --cache-dir {s}", "family llama, not mistral"),
        (hf_to_megatron, "llama --out {t}/o --cache-dir {t}", "name Meta's folder"),
        (hf_to_megatron, "llama2 --out {t}/o --model-path no/such", "no/such is neither a folder here"),
        (megatron_to_hf, "--input_dir {s} --output_dir {t}/o --model falcon", "holds a model of llama"),
        (verify_correctness, "--load {s}", "--huggingface_cache"),
    ],
)
def test_bad_input_is_one_error(tool: Tool, tmp_path: Path, module: object, line: str, said: str) -> None:
    told = tool(module, line.format(s=STORIES, t=tmp_path), code=2)
    assert told.count("error: ") == 1 and said in told, told
    assert not (tmp_path / "o").exists()


def test_a_wrong_weight_or_configuration_is_no_agreement(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text, copy = tmp_path / "text.txt", tmp_path / "copy"
    text.write_text(TEXT)
    assert main(["convert", str(STORIES), str(tmp_path / "n"), "--verify", str(text), "--layers"]) == 0
    output = capsys.readouterr().out
    assert "behind layer 4: " in output and "equal to transformers" in output
    shutil.copytree(STORIES, copy)
    (copy / "model.safetensors").chmod(0o644)
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-4000:-3000] = bytes(1000)  # a quarter of a thousand weights
    (copy / "model.safetensors").write_bytes(content)
    assert main(["diff", str(copy), str(STORIES), "--logits", str(text)]) == 1
    assert "NOT equal to transformers" in capsys.readouterr().out
    (copy / "config.json").chmod(0o644)
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-6}))
    with pytest.raises(ConfigError, match="different functions: rms_norm_eps=1e-06 and 1e-05"):
        logits.Comparer(copy, STORIES)


def test_meditrons_fine_tuning(tool: Tool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """sft.py's documented line but for its sizes, up to torchrun; then what torchrun is given, in this process."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path / "checkpoints/baseline-7b"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=544, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
            max_position_embeddings=64, rms_norm_eps=1e-5,
        )
    ).save_pretrained(folder)  # fmt: skip
    shutil.copyfile(STORIES / "tokenizer.model", folder / "tokenizer.model")
    for part, count in (("train", 5), ("validation", 3)):
        lines = [json.dumps({"prompt": f"Is {number} high?", "gold": "yes"}) + "\n" for number in range(count)]
        (tmp_path / f"medqa_cot_{part}.jsonl").write_text("".join(lines))
    monkeypatch.chdir(tmp_path)
    commands: list[list[str]] = []
    monkeypatch.setattr(os, "execv", lambda path, words: commands.append(words))
    line = (
        f"--checkpoint=baseline --size=7 --run_name=cotmedqa --data {tmp_path}/medqa_cot_train.jsonl --val "
        f"{tmp_path}/medqa_cot_validation.jsonl --micro_batch=32 --nodes=1 --addr=localhost --save_interval=200 --pp=1 "
        "--tp 1 --seq 48 --rank=0"
    )
    sft.main(shlex.split(line))
    sft.main(shlex.split(line))  # nothing is tokenized again
    assert commands[0] == commands[1] and "torch.distributed.run" in commands[0]
    words = commands[0][commands[0].index(str(ROOT / "tools/finetune.py")) + 1 :]
    words[words.index("--bf16")] = "--use_flash_attn"  # slow without a GPU
    output = tool(finetune, shlex.join(words))
    assert " iteration       10/      10 | consumed samples:          640 |" in output
    assert "validation loss at the end of training for val data" in output and "instruct accuracy value" in output
    assert [step for step, _ in whole_checkpoints(Path("checkpoints/cotmedqa"))] == [10]
    assert "nothing to do" in tool(finetune, shlex.join(words)), "the same command goes on"


def test_steps_are_those_of_the_paper() -> None:
    published = {159_669: 7490, 182_822: 8570, 10_178: 480, 8_204: 390, 200_000: 9380, 193_450: 9070, 369_847: 17340}
    assert {count: sft.steps_of(3, count) for count in published} == published
    assert sft.main(["--checkpoint=meditron", "--run_name=x", "--data", "/no"]) == 2
