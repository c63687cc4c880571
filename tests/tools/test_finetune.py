"""Megatron-LLM's finetune.py: its documented command lines as they stand, its log lines as a stranger reads them."""

from __future__ import annotations

import re
import shlex
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from megatron.checkpoint.manager import whole_checkpoints
from megatron.data.indexed import IndexedWriter
from tools.finetune import words_of_verb
from tools.megatron_llm_flags import run_tool

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K-untied"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real data in ../shared, which is not there")
TRAIN_LINE = re.compile(
    r"^ iteration +(\d+)/ +(\d+) \| consumed samples: +(\d+) \| elapsed time per iteration \(ms\): ([\d.]+) \| "
    r"rate \(tokens/sec\): ([\d.]+) \| learning rate: (\d\.\d{3}E[+-]\d{2}) \| global batch size: +(\d+) \| "
    r"lm loss: (\d\.\d{6}E[+-]\d{2}) \| loss scale: (\d\.\d) \| grad norm: (\d+\.\d{3}) \| "
    r"number of skipped iterations: +(\d+) \| number of nan iterations: +(\d+) \|$",
    re.MULTILINE,
)
COMMON = "--hidden_dropout 0.0 --attention_dropout 0.0 --no_bias_gelu_fusion"
LLAMA = "--use_rms_norm --glu_activation swiglu --no_tie_embed_logits --no_new_tokens --layernorm_epsilon 1e-5"
LIST = "[bib_ref],[/bib_ref],[fig_ref],[/fig_ref],[bib],[/bib],[fig],[/fig],[table],[/table],[formula],[/formula]"
SMALL = "--seq_length 32 --max_position_embeddings 512"  # their own options, to suit a CPU


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pair of 60 documents of random tokens."""
    prefix = tmp_path_factory.mktemp("data") / "starcoder_text_document"
    generator = np.random.default_rng(0)
    with IndexedWriter(prefix, "uint16") as writer:
        for _ in range(60):
            writer.add_sequence(generator.integers(3, 500, 80).tolist())
            writer.end_document()
    return prefix


@pytest.fixture
def finetune(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., tuple[int, str, str]]:
    """Runs a command line in this process: exit code, standard output, standard error."""

    def run(line: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["finetune.py", *shlex.split(line)])
        code = run_tool(words_of_verb)
        return code, *capfd.readouterr()

    return run


def test_the_first_documented_training_and_its_log(
    finetune: Callable[..., tuple[int, str, str]], data: Path, tmp_path: Path
) -> None:
    line = (
        f"--tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 --load {STORIES} --save {tmp_path}/w "
        f"--tensorboard_dir {tmp_path}/w/tensorboard/ --data_path {data} --model_name llama2 "
        f"--tokenizer_type SentencePieceTokenizer --vocab_file={STORIES}/tokenizer.model --use_flash_attn "
        "--micro_batch_size 1 --global_batch_size 4 --sequence_parallel --recompute_granularity selective "
        f"--use_checkpoint_args {COMMON} --log_interval 2 --save_interval 2 --eval_interval 2 --train_iters 4 "
        f"--lr_decay_style cosine --lr_warmup_iters 1 --lr 3e-4 --min_lr 1e-6 {LLAMA} {SMALL} --eval_iters 1 "
        "--split 80,10,10 --metrics perplexity accuracy count_loss_mask"
    )
    code, output, errors = finetune(line)
    assert code == 0, errors
    lines = TRAIN_LINE.findall(output)
    assert [(*fields[:3], fields[6]) for fields in lines] == [("2", "4", "8", "4"), ("4", "4", "16", "4")]
    assert [fields[5] for fields in lines] == ["2.252E-04", "1.000E-06"], "the rate of the step to come"
    assert all(float(fields[7]) > 1 and float(fields[4]) > 0 and fields[8] == "1.0" for fields in lines)
    where = re.findall(r"^(-+)\n( validation loss at ([\w ]+) \| .* \| )\n\1$", output, re.MULTILINE)
    assert [place for _, _, place in where] == ["iteration 2", "iteration 4", "the end of training for val data"]
    assert all(len(ruler) == len(text) + 1 for ruler, text, _ in where)
    figures = dict(re.findall(r"\| ([\w ]+): (\d\.\d{6}E[+-]\d{2})", where[0][1]))
    assert list(figures) == ["lm loss value", "lm loss PPL", "ppl value", "lm accuracy value", "count loss mask value"]
    assert float(figures["count loss mask value"]) == 32.0
    assert " > datasets target sizes (minimum size):\n    train:      16\n    validation: 12\n" in output
    assert re.search(r"^    number of documents: (\d+)$", output, re.MULTILINE)[1] == "60"
    assert re.search(r"^\[before the start of training step\] datetime: \d{4}-\d\d-\d\d \d\d:\d\d:\d\d $", output, re.M)
    assert f"saving checkpoint at iteration       2 to {tmp_path}/w\n" in output
    assert output.count("  successfully saved checkpoint at iteration       4 to") == 1
    assert "the project" not in output and "step 4/4" in errors
    check_tags(tmp_path / "w/tensorboard", lines, figures)
    goes_on(finetune, line.replace("--train_iters 4", "--train_iters 6"), tmp_path)


def check_tags(folder: Path, lines: list[tuple[str, ...]], validated: dict[str, str]) -> None:
    """What dashboards find in the folder: Megatron-LLM's tags, a figure for each step."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator(str(folder)).Reload()
    found = {tag: {event.step: event.value for event in board.Scalars(tag)} for tag in board.Tags()["scalars"]}
    each = ("lm loss", "learning_rate", "grad_norm", "loss_scale", "batch_size")
    assert {tag: list(found[tag]) for tag in each} == {tag: [1, 2, 3, 4] for tag in each}
    assert {tag: list(found[f"{tag} vs samples"]) for tag in each} == {tag: [4, 8, 12, 16] for tag in each}
    for number, fields in enumerate(lines):
        losses = [found["lm loss"][step] for step in (2 * number + 1, 2 * number + 2)]
        assert sum(losses) / 2 == pytest.approx(float(fields[7]), rel=1e-5), "the line has their mean"
        assert found["learning_rate"][2 * number + 2] == pytest.approx(float(fields[5]), rel=1e-3)
        assert found["tokens-per-sec"][2 * number + 2] == pytest.approx(float(fields[4]), rel=1e-3)
    assert list(found["lm loss validation"]) == list(found["lm accuracy validation"]) == [2, 4]
    assert list(found["lm loss validation ppl vs samples"]) == [8, 16]
    assert found["lm loss validation"][2] == pytest.approx(float(validated["lm loss value"]), rel=1e-5)
    assert found["lm loss validation ppl"][2] == pytest.approx(float(validated["lm loss PPL"]), rel=1e-5)
    assert list((folder / "tensorboard").iterdir()), "the project's own figures beside them"


def goes_on(finetune: Callable[..., tuple[int, str, str]], line: str, tmp_path: Path) -> None:
    """Megatron's order depends on the length, which is said; the same length has nothing left to do."""
    code, _, errors = finetune(line)
    assert code == 2 and "trained on another order of samples" in errors
    code, output, errors = finetune(line.replace("--train_iters 6", "--train_iters 4"))
    assert code == 0 and "nothing to do" in errors and output == ""
    assert [step for step, _ in whole_checkpoints(tmp_path / "w")] == [2, 4]


def test_meditrons_pretraining_and_its_evaluation(
    finetune: Callable[..., tuple[int, str, str]], data: Path, tmp_path: Path
) -> None:
    line = (
        f"--tensor_model_parallel_size 1 --pipeline_model_parallel_size 1 --load {STORIES} --save {tmp_path}/s "
        f"--tensorboard_dir {tmp_path}/tb --model_name llama2 --tokenizer_type SentencePieceTokenizer "
        f"--global_batch_size 2 --micro_batch_size 1 --vocab_file={STORIES}/tokenizer.model --use_rms_norm "
        f'--glu_activation swiglu --no_tie_embed_logits --vocab_extra_ids_list "{LIST}" --layernorm_epsilon 1e-5 '
        "--use_flash_attn --no_bias_gelu_fusion --seq_length 4096 --max_position_embeddings 4096 --log_interval 1 "
        "--eval_interval 10 --save_interval 20 --use_checkpoint_args --hidden_dropout 0.0 --position_embedding_type "
        "rotary --no_bias_dropout_fusion --attention_dropout 0.0 --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5 "
        "--lr_decay_style cosine --lr_warmup_iters 1 --lr 3e-4 --min_lr 1e-6 --weight_decay 0.1 --sequence_parallel "
        "--recompute_granularity selective --log_validation_ppl_to_tensorboard --log_memory_to_tensorboard "
        f"--log_timers_to_tensorboard --num_workers 0 --dataloader_type cyclic --train_data_path {data} "
        f"--valid_data_path {data} --test_data_path {data} --eval_iters 1 --train_iters 2 --seq_length 32"
    )
    code, output, errors = finetune(line)
    assert code == 0, errors
    assert "--max_position_embeddings 4096: the model's are 512, which stay" in errors
    assert len(TRAIN_LINE.findall(output)) == 2
    places = re.findall(r"validation loss at (the end of training for \w+ data) \| lm loss value", output)
    assert places == ["the end of training for val data", "the end of training for test data"]
    line = f"--finetune {line} --eval_only --use_checkpoint_opt_param_scheduler".replace(str(STORIES), "LOAD", 1)
    code, output, errors = finetune(line.replace("LOAD", f"{tmp_path}/s"))
    assert code == 0, errors
    assert re.search(r"^ validation loss at the end of training for test data \| lm loss value: \d", output, re.M)


def free_port() -> int:
    with socket.socket() as server:
        server.bind(("localhost", 0))
        return int(server.getsockname()[1])


def test_all_ranks_of_a_tensor_and_pipeline_grid(data: Path, tmp_path: Path) -> None:
    """examples/finetune.sh, expanded, under torchrun: lines come once, from the last process."""
    line = (
        "-m torch.distributed.run --nproc_per_node 2 --nnodes 1 --node_rank 0 --master_addr localhost "
        f"--master_port {free_port()} tools/finetune.py --tensor_model_parallel_size 2 "
        f"--pipeline_model_parallel_size 1 --load {STORIES} --save {tmp_path}/s --tensorboard_dir "
        f"{tmp_path}/s/logging --data_path {data} --model_name llama2 --tokenizer_type SentencePieceTokenizer "
        f"--global_batch_size 4 --micro_batch_size 1 --num_workers=2 --vocab_file=/no/such/tokenizer.model "
        f"--use_rms_norm --glu_activation swiglu --no_tie_embed_logits --vocab_extra_ids_list {shlex.quote(LIST)} "
        f"--vocab_file={STORIES}/tokenizer.model --layernorm_epsilon 1e-5 --use_flash_attn --no_bias_gelu_fusion "
        "--seq_length 32 --max_position_embeddings 512 --log_interval 1 --save_interval 800 --eval_interval 200 "
        "--eval_iters 1 --hidden_dropout 0.0 --position_embedding_type rotary --no_bias_dropout_fusion "
        "--use_checkpoint_args --attention_dropout 0.0 --adam_beta1 0.9 --adam_beta2 0.95 --adam_eps 1e-5 "
        "--lr_decay_style cosine --lr_warmup_fraction 0.1 --lr 3e-4 --min_lr 3e-4 --weight_decay 0.1 "
        "--sequence_parallel --recompute_granularity selective --log_timers_to_tensorboard --scalar_loss_mask=0.0 "
        "--rope_scaling_factor 1.0 --metrics perplexity accuracy count_loss_mask --train_iters 2 --split 80,10,10"
    )
    done = subprocess.run(
        [sys.executable, *shlex.split(line)], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "CUDA_DEVICE_MAX_CONNECTIONS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert [fields[0] for fields in TRAIN_LINE.findall(done.stdout)] == ["1", "2"]
    assert done.stdout.count("> datasets target sizes") == done.stdout.count("for val data") == 1
    assert "sequence parallel" in done.stderr and "tensor 2 x data 1" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("--load /nowhere", "/nowhere does not exist"),
        (f"--load {STORIES} --load_iters 7", f"{STORIES} holds none of step_0000007, iter_0000007"),
        (f"--load {STORIES} --vocab_extra_ids_list \"'a,b'\"", "quotes within its tokens"),
        (f"--load {STORIES} --eval_only", "--eval_only evaluates one prefix of --test_data_path"),
        (f"--load {STORIES} --seqlength 3", "did you mean --seq_length?"),
        (f"--load {STORIES} --hidden_size 96", "model.hidden_size=96"),
    ],
)
def test_bad_input_is_one_error(
    finetune: Callable[..., tuple[int, str, str]], data: Path, words: str, said: str
) -> None:
    tokenizer = f"--tokenizer_type SentencePieceTokenizer --vocab_file {STORIES}/tokenizer.model"
    code, output, errors = finetune(
        f"--micro_batch_size 1 --lr 1e-4 --train_iters 1 --data_path {data} --eval_iters 0 {tokenizer} {words}"
    )
    assert code == 2 and output == ""
    assert errors.count("error: ") == 1 and "finetune.py: error: " in errors and said in errors, errors


def test_a_model_made_at_random(finetune: Callable[..., tuple[int, str, str]], data: Path) -> None:
    code, output, errors = finetune(
        f"--num_layers 2 --hidden_size 32 --num_attention_heads 4 --seq_length 16 --micro_batch_size 2 --lr 1e-3 "
        f"--train_samples 8 --data_path {data} --vocab_file {STORIES}/tokenizer.model --eval_iters 0 --log_interval 1 "
        "--model_name llama --vocab_extra_ids 3 --rampup_batch_size 2 2 4 --global_batch_size 4 --init_method_std 0.01"
    )
    assert code == 0, errors
    assert [(fields[2], fields[6]) for fields in TRAIN_LINE.findall(output)] == [("2", "2"), ("4", "2"), ("8", "4")]


@pytest.mark.parametrize(
    ("flag", "steps", "reason"),
    [
        ("--exit_interval 2", [2, 4], "train.exit_interval=2"),
        ("--exit_duration_in_mins 1e-4", [1, 2], "0.0001 are over"),
    ],
)
def test_a_run_that_ends_for_now_is_saved_and_goes_on(
    finetune: Callable[..., tuple[int, str, str]], data: Path, tmp_path: Path, flag: str, steps: list[int], reason: str
) -> None:
    line = (
        f"--num_layers 1 --hidden_size 16 --num_attention_heads 2 --seq_length 8 --micro_batch_size 1 --lr 1e-3 "
        f"--train_iters 5 --data_path {data} --vocab_file {STORIES}/tokenizer.model --eval_iters 0 --model_name llama "
        f"--save {tmp_path}/s --save_interval 100 --log_interval 1 {flag}"
    )
    for number, step in enumerate(steps):
        code, output, errors = finetune(line)
        assert code == 0 and f"stopped after step {step} (" in errors and reason in errors, errors
        assert [saved for saved, _ in whole_checkpoints(tmp_path / "s")] == steps[: number + 1]
        assert f"saving checkpoint at iteration {step:7d} to" in output
