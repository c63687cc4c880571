"""Conversion both ways: nothing lost, nothing half done, little memory."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
from collections import namedtuple
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

import megatron
from megatron.__main__ import main
from megatron.checkpoint import convert as convert_module
from megatron.checkpoint import copying, targets
from megatron.checkpoint.convert import convert
from megatron.checkpoint.safetensors_file import SafetensorsWriter
from megatron.checkpoint.source import open_source
from megatron.model.config import ModelConfig, spell_for_both
from megatron.model.specs import canonical_shapes
from megatron.parallel.layout import Region
from megatron.utils.errors import CheckpointError, ConfigError

from .conftest import CONFIG, save

BF16 = {**CONFIG, "torch_dtype": "bfloat16"}


def random_weights(config: dict, dtype: torch.dtype = torch.bfloat16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    shapes = canonical_shapes(ModelConfig.from_huggingface(config))
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def write_model(folder: Path, config: dict, weights: dict[str, torch.Tensor]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(b"pieces")
    (folder / "tokenizer_config.json").write_text("{}")
    (folder / "generation_config.json").write_text('{"temperature": 0.6}')
    (folder / "LICENSE").write_text("licence")
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    return folder


def read_all(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of a Hugging Face folder, by the safetensors library."""
    files = sorted(folder.glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[name].dtype == b[name].dtype and torch.equal(a[name].view(torch.uint8), b[name].view(torch.uint8))
        for name in a
    )


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return write_model(tmp_path / "model", BF16, random_weights(BF16))


GRIDS = [(None, None), (1, 1), (2, None), (4, None), (None, 3), (2, 2)]  # 4 is more than there are key/value heads


GPT2 = {"model_type": "gpt2", "vocab_size": 41, "n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 20}
GPT_NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 41,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "use_parallel_residual": False,
    "rotary_pct": 1.0,
}


@pytest.mark.parametrize(("tensor", "pipeline"), [(None, None), (1, 1), (2, None), (4, 3)])
@pytest.mark.parametrize(
    "config", [GPT2, {**GPT2, "tie_word_embeddings": False}, GPT_NEOX], ids=["tied", "gpt2", "neox"]
)
def test_the_round_trip_of_other_families_is_bit_exact(tmp_path: Path, config: dict, tensor, pipeline) -> None:
    """Weights stored transposed or fused come back as they were, whatever grid cut them in between."""
    model = write_model(tmp_path / "model", config, random_weights(config))
    done = convert(model, tmp_path / "native", tensor=tensor, pipeline=pipeline)
    assert done.files == (tensor or 1) * (pipeline or 1)
    convert(tmp_path / "native", tmp_path / "back")
    assert same(read_all(model), read_all(tmp_path / "back"))
    written = json.loads((tmp_path / "back" / "config.json").read_text())
    assert ModelConfig.from_huggingface(written) == ModelConfig.from_huggingface(config)
    assert config.items() <= written.items()


@pytest.mark.parametrize(("tensor", "pipeline"), GRIDS)
def test_the_round_trip_is_bit_exact_on_any_cut(model: Path, tmp_path: Path, tensor, pipeline) -> None:
    done = convert(model, tmp_path / "native", tensor=tensor, pipeline=pipeline)
    assert (done.format, done.files) == ("native", (tensor or 1) * (pipeline or 1))
    with open_source(tmp_path / "native") as source:
        assert (source.step, source.state, source.has_optimizer, source.run_config) == (0, None, False, None)
    back = convert(tmp_path / "native", tmp_path / "back")
    assert (back.format, back.tensors, back.files) == ("huggingface", 30, 1)
    assert same(read_all(tmp_path / "back"), read_all(model))
    for name in ("tokenizer.model", "tokenizer_config.json", "generation_config.json", "LICENSE"):
        assert (tmp_path / "back" / name).read_bytes() == (model / name).read_bytes()


ROPE = {"rope_type": "default", "rope_theta": 5e5}
SPELLED = {
    "rope_theta": 5e5,
    "rope_scaling": None,
    "rope_parameters": ROPE,
    "torch_dtype": "bfloat16",
    "dtype": "bfloat16",
}
BARE = {key: value for key, value in CONFIG.items() if key != "torch_dtype"}


@pytest.mark.parametrize(
    "spelling",
    [
        {"rope_parameters": ROPE, "dtype": "bfloat16"},
        {"rope_parameters": ROPE},
        {"rope_theta": 5e5, "torch_dtype": "bfloat16"},
        {"rope_theta": 5e5, "rope_scaling": None, "torch_dtype": "bfloat16"},
        {"rope_scaling": {"type": "default", "rope_theta": 5e5}, "torch_dtype": "bfloat16"},
    ],
    ids=["transformers 5", "no dtype", "transformers 4", "with null", "inside rope_scaling"],
)
def test_an_export_says_all_in_the_words_of_transformers_4_and_5(tmp_path: Path, spelling: dict) -> None:
    """One that finds only the other's words takes a rotary base of 10,000 without a word."""
    config = {**BARE, **spelling, "an_unknown_key": {"kept": [1]}}
    model = write_model(tmp_path / "model", config, random_weights(config))
    convert(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "export")
    convert(model, tmp_path / "direct", to="huggingface")
    for folder in ("export", "direct"):
        written = json.loads((tmp_path / folder / "config.json").read_text())
        assert written == {**config, **SPELLED}


def test_a_configuration_that_says_it_all_is_carried_byte_for_byte(tmp_path: Path) -> None:
    config = {**BARE, **SPELLED}
    model = write_model(tmp_path / "model", config, random_weights(config))
    convert(model, tmp_path / "native")
    convert(tmp_path / "native", tmp_path / "back")
    assert (tmp_path / "back" / "config.json").read_bytes() == (model / "config.json").read_bytes()


def test_blocks_of_rows_make_no_difference(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(copying, "BLOCK_BYTES", 100)  # three rows of the embedding
    convert(model, tmp_path / "native", tensor=2)
    convert(tmp_path / "native", tmp_path / "back")
    assert same(read_all(tmp_path / "back"), read_all(model))


def test_the_real_model_round_trip(shared: Path, tmp_path: Path) -> None:
    model = shared / "data" / "stories260K-untied"
    convert(model, tmp_path / "native", tensor=2, pipeline=2)
    convert(tmp_path / "native", tmp_path / "back")
    assert same(read_all(tmp_path / "back"), read_all(model))


def test_large_models_are_written_in_shards_with_an_index(model: Path, tmp_path: Path) -> None:
    done = convert(model, tmp_path / "sharded", to="huggingface", file_bytes=4000)
    files = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert done.files == len(files) > 2
    assert files[0] == f"model-00001-of-{done.files:05d}.safetensors"
    index = json.loads((tmp_path / "sharded" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == done.size_bytes
    assert set(index["weight_map"].values()) == set(files)
    for file in files:
        tensors = load_file(tmp_path / "sharded" / file)
        assert all(index["weight_map"][name] == file for name in tensors)
        assert sum(tensor.nbytes for tensor in tensors.values()) <= 4000
    assert same(read_all(tmp_path / "sharded"), read_all(model))
    convert(tmp_path / "sharded", tmp_path / "native", file_bytes=4000)
    assert len(list((tmp_path / "native").glob("weights-*.safetensors"))) == done.files
    convert(tmp_path / "native", tmp_path / "back")
    assert same(read_all(tmp_path / "back"), read_all(model))


@given(st.lists(st.integers(1, 50), min_size=1, max_size=30), st.integers(1, 30))
def test_the_least_size_for_a_number_of_files(sizes: list[int], files: int) -> None:
    limit = targets.limit_for(sizes, files)
    parts = targets.pack(sizes, limit)
    assert [number for part in parts for number in part] == list(range(len(sizes))) and len(parts) <= files
    assert all(sum(sizes[number] for number in part) <= limit for part in parts)
    assert limit == max(sizes) or len(targets.pack(sizes, limit - 1)) > files


@pytest.mark.parametrize("tied", [False, True])
def test_transformers_loads_the_export(tmp_path: Path, tied: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = {**CONFIG, "tie_word_embeddings": tied}
    model = write_model(tmp_path / "model", config, random_weights(config, torch.float32))
    convert(model, tmp_path / "native", tensor=2)
    convert(tmp_path / "native", tmp_path / "export")
    assert ("lm_head.weight" in read_all(tmp_path / "export")) is not tied
    tokens = torch.arange(20)[None]
    logits = []
    for folder in (model, tmp_path / "export"):
        loaded = transformers.LlamaForCausalLM.from_pretrained(folder)
        logits.append(loaded(tokens).logits.detach())
    assert logits[0].isfinite().all() and torch.equal(*logits)


@pytest.mark.parametrize("name", ["bf16", "fp32", "fp16", "fp64"])
def test_casting(tmp_path: Path, name: str) -> None:
    config = {**CONFIG, "an_unknown_key": {"kept": [1]}}
    weights = random_weights(config, torch.float32)
    model = write_model(tmp_path / "model", config, weights)
    dtype = convert_module.DTYPES[name]
    convert(model, tmp_path / "cast", to="huggingface", dtype=dtype)
    spelled = str(dtype).removeprefix("torch.")
    written = json.loads((tmp_path / "cast" / "config.json").read_text())
    assert written == spell_for_both(config, spelled)
    assert same(read_all(tmp_path / "cast"), {key: tensor.to(dtype) for key, tensor in weights.items()})


def test_values_beyond_fp16_are_not_made_infinite(tmp_path: Path) -> None:
    weights = random_weights(CONFIG, torch.float32)
    weights["model.norm.weight"][3] = 70_000
    model = write_model(tmp_path / "model", CONFIG, weights)
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight has values that are not finite in fp16"):
        convert(model, tmp_path / "cast", dtype=torch.float16)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_training_checkpoint_becomes_a_model(tmp_path: Path) -> None:
    """Saved by five ranks in many rectangles, as bf16 from a float32 beginning."""
    weights = random_weights(CONFIG)
    master = {name: tensor.float() for name, tensor in weights.items()}
    tensors = {"weights": weights, "master": master, "exp_avg": master, "exp_avg_sq": master}
    save(tmp_path / "save", tensors, step=9, ranks=5, cuts=7, chance=random.Random(1), state={"consumed_tokens": 1})
    done = convert(tmp_path / "save", tmp_path / "export")
    assert done.source == tmp_path / "save" / "step_0000009" and done.left_out == ("the optimizer state",)
    assert same(read_all(tmp_path / "export"), weights)
    written = json.loads((tmp_path / "export" / "config.json").read_text())
    assert written == spell_for_both(CONFIG, "bfloat16")  # what the files now are
    convert(tmp_path / "save", tmp_path / "weights", to="native")
    with open_source(tmp_path / "weights") as source:
        assert (source.step, source.state, source.has_optimizer) == (0, None, False)
        out = torch.empty(40, 16, dtype=torch.bfloat16)
        source.read(Region.whole("lm_head.weight", (40, 16)), out)
        assert torch.equal(out, weights["lm_head.weight"])


def _drop(weights: dict, name: str) -> dict:
    return {key: tensor for key, tensor in weights.items() if key != name}


FAULTS = {
    "missing": (lambda w: _drop(w, "lm_head.weight"), "1 missing: lm_head.weight"),
    "unexpected": (lambda w: {**w, "bias": torch.ones(1)}, "1 unexpected: bias"),
    "shape": (lambda w: {**w, "model.norm.weight": torch.ones(15)}, "model.norm.weight has shape [15]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_weights_that_do_not_fit_the_configuration(tmp_path: Path, fault: str) -> None:
    change, message = FAULTS[fault]
    model = write_model(tmp_path / "model", BF16, change(random_weights(BF16)))
    with pytest.raises(CheckpointError) as caught:
        convert(model, tmp_path / "native")
    assert message in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_damaged_checkpoint_is_not_converted(model: Path, tmp_path: Path) -> None:
    convert(model, tmp_path / "native", tensor=2)
    file = tmp_path / "native" / "weights-00001.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 4
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"weights-00001\.safetensors is damaged: its checksum"):
        convert(tmp_path / "native", tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize("existing", [True, False])
def test_after_an_error_half_way_nothing_remains(model: Path, tmp_path: Path, existing: bool) -> None:
    destination = tmp_path / "out"
    if existing:
        destination.mkdir()

    def progress(what: str, done: int, total: int) -> None:
        if done > total // 2:
            assert list(tmp_path.glob("out.*.partial/*"))
            raise OSError(28, "No space left on device")

    with pytest.raises(CheckpointError, match="cannot be written"):
        convert(model, destination, progress=progress, tensor=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "out"][: 1 + existing]
    assert not existing or not any(destination.iterdir())


@pytest.mark.parametrize("to", ["native", "megatron-llm"])
def test_an_interrupted_conversion_goes_on_to_the_same_result(model: Path, tmp_path: Path, monkeypatch, to) -> None:
    """Finished files are not written again, and the result is that of a conversion in one go."""
    monkeypatch.setattr(copying, "_WORKERS", 1)
    grid = {"tensor": 2, "pipeline": 3}
    convert(model, tmp_path / "once", to=to, **grid)
    copied = [0, 0]

    def progress(what: str, done: int, total: int) -> None:
        copied[0] = done
        if done > total // 2 and not copied[1]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", to=to, progress=progress, **grid)
    (partial,) = tmp_path.glob("out.*.partial")
    done = {path: path.stat().st_mtime_ns for name in copying.read_journal(partial) for path in [partial / name]}
    assert done and not (tmp_path / "out").exists()
    copied[1] = 1
    convert(model, tmp_path / "out", to=to, progress=progress, **grid)
    files = {path.relative_to(tmp_path / "once"): path for path in (tmp_path / "once").rglob("*") if path.is_file()}
    assert files.keys() == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    for name, path in files.items():
        assert (tmp_path / "out" / name).read_bytes() == path.read_bytes(), name
    for path, written_ns in done.items():
        assert (tmp_path / "out" / path.relative_to(partial)).stat().st_mtime_ns == written_ns
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("to", ["native", "megatron-llm", "huggingface"])
def test_a_killed_conversion_leaves_no_destination_and_goes_on(model: Path, tmp_path: Path, to) -> None:
    grid = {} if to == "huggingface" else {"tensor": 2, "pipeline": 3}
    convert(model, tmp_path / "once", to=to, **grid)

    def die(what: str, done: int, total: int) -> None:
        if done > total // 2:
            os.kill(os.getpid(), signal.SIGKILL)

    child = os.fork()
    if not child:
        try:
            convert(model, tmp_path / "out", to=to, progress=die, **grid)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert not (tmp_path / "out").exists() and list(tmp_path.glob("out.*.partial"))
    convert(model, tmp_path / "out", to=to, **grid)
    files = {path.relative_to(tmp_path / "once"): path for path in (tmp_path / "once").rglob("*") if path.is_file()}
    assert files.keys() == {p.relative_to(tmp_path / "out") for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert all((tmp_path / "out" / name).read_bytes() == path.read_bytes() for name, path in files.items())
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize("to", ["native", "megatron-llm", "meta", "huggingface"])
def test_a_file_system_that_refuses_leaves_nothing(model: Path, tmp_path: Path, to) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))  # less than the weights
    try:
        with pytest.raises(CheckpointError, match=r"cannot be written \(File too large\)"):
            convert(model, tmp_path / "out", to=to)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_what_was_begun_for_another_source_is_not_gone_on_with(model: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(copying, "_WORKERS", 1)

    def interrupt(what: str, done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(model, tmp_path / "out", tensor=2, progress=interrupt)
    changed = {name: tensor + 1 for name, tensor in read_all(model).items()}
    save_file(changed, model / "model.safetensors", {"format": "pt"})
    convert(model, tmp_path / "out", tensor=2)
    convert(tmp_path / "out", tmp_path / "back")
    assert same(read_all(tmp_path / "back"), changed)


def test_two_conversions_to_one_folder_do_not_mix(model: Path, tmp_path: Path) -> None:
    refused = []

    def progress(what: str, done: int, total: int) -> None:
        if not refused:
            with pytest.raises(CheckpointError, match="is being written by another process"):
                convert(model, tmp_path / "out")
            refused.append(True)

    convert(model, tmp_path / "out", progress=progress)
    assert refused


def test_too_little_room_is_told_before_writing(model: Path, tmp_path: Path, monkeypatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10_000, 9_000, 1_000))
    with pytest.raises(CheckpointError, match=r"has 1000 B left, 14\.0 KiB are needed: make room"):
        convert(model, tmp_path / "out", progress=lambda *arguments: pytest.fail("wrote"))
    assert not list(tmp_path.glob("out*"))


def test_an_empty_folder_is_filled_and_another_is_not_touched(model: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    convert(model, tmp_path / "out")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}
    with pytest.raises(CheckpointError, match=r"out exists already: name a new or empty folder"):
        convert(model, tmp_path / "out")
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "out").iterdir()}


def test_requests_that_cannot_be(model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="leave them out for Hugging Face"):
        convert(model, tmp_path / "out", to="huggingface", tensor=2)
    with pytest.raises(ConfigError, match="these are cut by ranks"):
        convert(model, tmp_path / "out", tensor=2, file_bytes=4000)
    with pytest.raises(ConfigError, match="at least 1"):
        convert(model, tmp_path / "out", tensor=0)
    with pytest.raises(ConfigError, match="3"):
        convert(model, tmp_path / "out", tensor=3)
    assert not (tmp_path / "out").exists()


def test_the_verb(model: Path, tmp_path: Path, capsys) -> None:
    native_folder, back = str(tmp_path / "native"), str(tmp_path / "back")
    assert main(["convert", str(model), native_folder, "--tensor", "2", "--pipeline", "3"]) == 0
    assert "30 tensors, 7.15 k parameters, 14.0 KiB in 6 files" in capsys.readouterr().out
    assert main(["convert", native_folder, back, "--to", "hf", "--dtype", "fp32"]) == 0
    expected = {name: tensor.float() for name, tensor in read_all(model).items()}
    assert same(read_all(tmp_path / "back"), expected)
    assert main(["convert", native_folder, str(tmp_path / "cut"), "--max-shard-size", "4kB"]) == 0
    assert len(list((tmp_path / "cut").glob("*.safetensors"))) == 4
    assert main(["convert", native_folder, str(tmp_path / "no"), "--max-shard-size", "four"]) == 2
    assert main(["convert", native_folder, back]) == 2
    assert "exists already" in capsys.readouterr().err


MEASURE = """
import os, sys
import megatron, torch
from pathlib import Path
def peak_bytes():  # ru_maxrss would also count what the process that started this one held
    return 1024 * int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
before = peak_bytes()
from megatron.checkpoint.convert import convert
os.fsync = lambda descriptor: None  # the disk's speed is not what is measured
convert(Path(sys.argv[1]), Path(sys.argv[2]), tensor=int(sys.argv[3]) or None)
print(peak_bytes() - before)
"""


@pytest.fixture
def large_model(tmp_path: Path) -> Iterator[Path]:
    """A Hugging Face folder of a gigabyte in two large tensors and some small ones: zeros, and noise at the end."""
    config = {**CONFIG, "vocab_size": 32768, "hidden_size": 4096, "head_dim": 64, "num_hidden_layers": 1}
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps(config))
    shapes = canonical_shapes(ModelConfig.from_huggingface(config))
    with SafetensorsWriter(
        model / "model.safetensors", {name: (torch.float32, shape) for name, shape in shapes.items()}
    ) as header:
        assert header.order[-1] == "lm_head.weight" and header.size_bytes > 2**30
    with open(model / "model.safetensors", "r+b") as file:
        noise = torch.randn(1024, 4096, generator=torch.Generator().manual_seed(1)).numpy().tobytes()
        file.seek(header.size_bytes - len(noise))
        file.write(noise)
    yield model
    for folder in tmp_path.iterdir():
        shutil.rmtree(folder)  # pytest keeps the temporary folders of three runs


def test_a_gigabyte_takes_less_than_400_megabytes(large_model: Path, tmp_path: Path) -> None:
    """Memory must not grow with the model, nor with its largest tensor."""
    native, back = tmp_path / "native", tmp_path / "back"
    for source, destination, tensor in ((large_model, native, "2"), (native, back, "0")):
        command = [sys.executable, "-c", MEASURE, str(source), str(destination), tensor]
        root = str(Path(megatron.__file__).parents[1])
        result = subprocess.run(command, env={**os.environ, "PYTHONPATH": root}, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        assert 0 < int(result.stdout) < 400e6
    expected, found = torch.empty(2048, 4096), torch.empty(2048, 4096)
    for folder, out in ((large_model, expected), (back, found)):
        with open_source(folder) as opened:
            opened.read(Region("lm_head.weight", (32768, 4096), (30720, 0), (2048, 4096)), out)
    assert expected[1024:].any() and torch.equal(expected, found)
