"""Models on the Hugging Face hub, against a stand-in of its HTTP interface on this machine."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from safetensors.torch import save_file

from megatron.__main__ import main
from megatron.checkpoint.hub import fetch_model, upload_model
from megatron.checkpoint.source import open_source
from megatron.config.load import load_config
from megatron.model.config import ModelConfig
from megatron.parallel.mesh import Axis
from megatron.parallel.world import World
from megatron.train.origin import describe_model, find_origin, shrunk_model
from megatron.utils import hub as hub_module
from megatron.utils.environment import Launch
from megatron.utils.errors import CheckpointError, ConfigError, ResourceError
from megatron.utils.hub import Repository, parse_address, spelling_hint
from tests.stand_in_hub import READ_TOKEN, TOKEN, Hub, redirect_client, running_hub

from .conftest import CONFIG
from .test_convert import random_weights, write_model

NAME = "Some/Model-7b"
ADDRESS = f"hf://{NAME}"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    return tmp_path / "home"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Hub]:
    with running_hub() as running:
        redirect_client(monkeypatch, running, home)
        yield running


@pytest.fixture
def model(tmp_path: Path, hub: Hub) -> Path:
    """A model that is also on the hub, there among other things."""
    folder = write_model(tmp_path / "model", CONFIG, random_weights(CONFIG, torch.float32))
    (folder / "original").mkdir()
    for other in (
        "pytorch_model.bin",
        "model.gguf",
        "consolidated.safetensors",
        "original/consolidated.00.pth",
        "x.py",
    ):
        (folder / other).write_bytes(b"not wanted")
    hub.publish(NAME, folder)
    return folder


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def convert(*words: object, code: int = 0) -> None:
    assert main(["convert", *map(str, words)]) == code


def test_what_is_converted_from_the_hub_equals_what_is_converted_from_a_folder(
    model: Path, hub: Hub, tmp_path: Path
) -> None:
    convert(ADDRESS, tmp_path / "one")
    convert(model, tmp_path / "other")
    assert content(tmp_path / "one") == content(tmp_path / "other")
    fetched = set(hub.fetched())
    assert "model.safetensors" in fetched and "tokenizer.model" in fetched
    assert not fetched & {"pytorch_model.bin", "model.gguf", "consolidated.safetensors", "consolidated.00.pth", "x.py"}
    hub.asked.clear()
    convert(ADDRESS, tmp_path / "again", "--to", "hf")
    assert hub.fetched() == [], "it is in the cache"


def test_adapters_come_from_the_hub_and_go_there(model: Path, hub: Hub, tmp_path: Path) -> None:
    adapter, layer = tmp_path / "adapter", "model.layers.0.self_attn.o_proj"
    adapter.mkdir()
    stated = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "base_model_name_or_path": ADDRESS}
    (adapter / "adapter_config.json").write_text(json.dumps(stated))
    factors = {"A": torch.ones(2, CONFIG["hidden_size"]), "B": torch.ones(CONFIG["hidden_size"], 2)}
    save_file(
        {f"base_model.model.{layer}.lora_{name}.weight": tensor for name, tensor in factors.items()},
        adapter / "adapter_model.safetensors",
    )
    hub.publish("Some/adapters", adapter)
    convert(model, tmp_path / "one", "--adapter", adapter)
    convert(model, tmp_path / "other", "--adapter", "hf://Some/adapters")
    convert("hf://Some/adapters", tmp_path / "whole")
    for folder in ("other", "whole"):
        assert main(["diff", str(tmp_path / "one"), str(tmp_path / folder)]) == 0
    assert main(["diff", str(tmp_path / "one"), str(model)]) == 1
    assert main(["inspect", "hf://Some/adapters"]) == 0
    upload_model(adapter, Repository("Some/again"), TOKEN)
    convert(model, tmp_path / "again", "--adapter", "hf://Some/again")
    assert main(["diff", str(tmp_path / "one"), str(tmp_path / "again")]) == 0


@pytest.mark.parametrize("form", ["shards", "bin", "bin shards", "meta", "native", "megatron-llm"])
def test_every_format_is_fetched_whole(model: Path, hub: Hub, tmp_path: Path, form: str) -> None:
    folder = tmp_path / "published"
    if form in ("meta", "native", "megatron-llm"):
        convert(model, folder, "--to", form, "--tensor", 2)
    else:
        write_in_parts(model, folder, form)
    hub.publish("Some/other", folder)
    hub.revisions["Some/other"]["main"]["release/../../../outside"] = b"of a stranger"
    assert main(["diff", str(folder), "hf://Some/other"]) == 0


def write_in_parts(model: Path, folder: Path, form: str) -> None:
    """The model as others write it: pickles, or in shards with names of their own."""
    folder.mkdir()
    shutil.copyfile(model / "config.json", folder / "config.json")
    weights = random_weights(CONFIG, torch.float32)
    names = sorted(weights)
    halves = [names] if form == "bin" else [names[::2], names[1::2]]
    weight_map = {}
    for number, half in enumerate(halves):
        part = {name: weights[name] for name in half}
        if form == "shards":
            file = f"part-{number}.safetensors"
            save_file(part, folder / file)
        else:
            file = "pytorch_model.bin" if form == "bin" else f"pytorch_model-{number}.bin"
            torch.save(part, folder / file)
        weight_map.update(dict.fromkeys(half, file))
    index = {"shards": "model.safetensors.index.json", "bin shards": "pytorch_model.bin.index.json"}.get(form)
    if index:
        (folder / index).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_a_revision_is_what_it_was(model: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = hub.commit(NAME, "main")
    hub.publish(NAME, model, revision="refs/pr/1")
    save_file(random_weights({**CONFIG, "num_hidden_layers": 2}, torch.float32), model / "model.safetensors")
    (model / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 2}))
    hub.publish(NAME, model)
    convert(ADDRESS, tmp_path / "old", "--revision", old)
    for path in (tmp_path / "old", f"{ADDRESS}@{old}", f"{ADDRESS}@refs/pr/1"):
        with open_source(path) as source:
            assert source.model_config["num_hidden_layers"] == 3
    with open_source(ADDRESS) as source:
        assert source.model_config["num_hidden_layers"] == 2
    convert(f"{ADDRESS}@one", tmp_path / "x", "--revision", "two", code=2)
    assert "name one" in capsys.readouterr().err
    convert(model, tmp_path / "x", "--revision", "two", code=2)
    assert "is a folder" in capsys.readouterr().err
    convert(f"{ADDRESS}@none", tmp_path / "x", code=2)
    assert f"{ADDRESS}@none has no branch, tag or commit none" in capsys.readouterr().err


def test_a_file_that_breaks_off_goes_on_where_it_was(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut["model.safetensors"] = [1000]
    folder = fetch_model(Repository(NAME))
    assert content(folder)["model.safetensors"] == (model / "model.safetensors").read_bytes()
    ranges = [asked for _, path, asked in hub.asked if path.endswith("/model.safetensors") and asked]
    assert ranges == ["bytes=1000-"]


def test_what_has_come_before_a_failure_is_kept(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, home: Path
) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.cut["model.safetensors"] = [0] * 9
    with pytest.raises(ConfigError, match="the same command goes on with the others"):
        fetch_model(Repository(NAME))
    hub.cut.clear()
    hub.asked.clear()
    fetch_model(Repository(NAME))
    assert hub.fetched() == ["model.safetensors"]


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("absent", "is not on http://localhost:"),
        ("private", "set HF_TOKEN to a token that may read it if private"),
        ("gated", f"accept its licence at http://localhost:.*{NAME}"),
        ("gated, other account", "accept its licence"),
        ("offline", "HF_HUB_OFFLINE forbids to ask the hub"),
        ("down", "failed at http://localhost:.*check the network"),
        ("unreachable", "failed at http://localhost:.*check the network"),
        ("no weights", "has no weights that are read here: .*found LICENSE, config.json, "),
        ("no model", "holds none of config.json"),
        ("a shard is missing", "is incomplete: part-1.safetensors is missing"),
        ("index that leads out", "only plain file names are read"),
    ],
)
def test_an_error_names_the_cure(
    model: Path, hub: Hub, home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str], fault: str, said: str,
) -> None:  # fmt: skip
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    files = hub.revisions[NAME]["main"]
    if fault == "absent":
        hub.revisions.clear()
    elif fault == "private":
        hub.private.add(NAME)
    elif fault.startswith("gated"):
        hub.gated.add(NAME)
        if fault != "gated":
            monkeypatch.setenv("HF_TOKEN", "hf_of_another")
    elif fault == "offline":
        redirect_client(monkeypatch, hub, home, offline=True)
    elif fault == "down":
        hub.closed = True
    elif fault == "unreachable":
        hub.port = 9  # where nobody listens
        redirect_client(monkeypatch, hub, home)
    elif fault == "no weights":
        del files["model.safetensors"], files["pytorch_model.bin"]
    elif fault == "no model":
        hub.revisions[NAME]["main"] = {"model.gguf": b"", "README.md": b""}
    else:
        del files["model.safetensors"]
        outside = "../part-1.safetensors" if fault == "index that leads out" else "part-1.safetensors"
        files["model.safetensors.index.json"] = json.dumps({"weight_map": {"a": outside}}).encode()
    convert(ADDRESS, tmp_path / "o", code=2)
    error = capsys.readouterr().err
    assert error.count("error: ") == 1 and "Traceback" not in error
    assert re.search(said, error), error
    assert not (tmp_path / "o").exists()


def test_a_token_opens_what_is_private(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.private.add(NAME)
    hub.gated.add(NAME)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    assert content(fetch_model(Repository(NAME)))["LICENSE"] == b"licence"


def test_without_a_network_the_cache_is_enough(
    model: Path, hub: Hub, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = fetch_model(Repository(NAME))
    hub.closed = True
    assert fetch_model(Repository(NAME)) == before
    redirect_client(monkeypatch, hub, home, offline=True)
    assert fetch_model(Repository(NAME)) == before
    (before / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=rf"{ADDRESS} has no weights .* found LICENSE, config.json"):
        open_source(ADDRESS)


def test_a_disk_that_is_too_small_is_said_before(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    class Usage:
        total, free = 10**9, 5

    monkeypatch.setattr(hub_module.shutil, "disk_usage", lambda path: Usage)
    with pytest.raises(ResourceError, match=r"needs .* more, and .* has 5 B left: .*HF_HOME"):
        fetch_model(Repository(NAME))
    assert "model.safetensors" not in hub.fetched()


def test_a_disk_that_fills_up_is_said(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object, **__: object) -> str:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", full)
    with pytest.raises(ResourceError, match=r"no space is left in .*HF_HOME"):
        fetch_model(Repository(NAME))


def test_what_is_uploaded_comes_back_the_same(
    model: Path, hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    convert(model, tmp_path / "native", "--tensor", 2)
    for token, said in (
        (None, "without a token"),
        (READ_TOKEN, "may only read"),
        ("hf_bad", "not be accessed with this"),
    ):
        if token is not None:
            monkeypatch.setenv("HF_TOKEN", token)
        convert(tmp_path / "native", "hf://Me/new", code=2)
        error = capsys.readouterr().err
        assert error.startswith("megatron convert: error: hf://Me/new ") and said in error and "HF_TOKEN" in error
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    convert(tmp_path / "native", "hf://Me/new", "--to", "native", code=2)
    assert "in Hugging Face's format" in capsys.readouterr().err
    hub.revisions["Me/new"] = {"main": {"model-00001-of-00002.safetensors": b"old", "README.md": b"mine"}}
    convert(tmp_path / "native", "hf://Me/new")
    assert f"hf://Me/new: uploaded to {hub.endpoint}/Me/new" in capsys.readouterr().out
    assert "model-00001-of-00002.safetensors" not in hub.revisions["Me/new"]["main"]
    assert hub.revisions["Me/new"]["main"]["README.md"] == b"mine" and "Me/new" not in hub.private
    convert(tmp_path / "native", tmp_path / "export")
    back = content(fetch_model(Repository("Me/new")))
    assert back == content(tmp_path / "export")
    convert(tmp_path / "native", "hf://Me/other@try")
    assert hub.revisions["Me/other"]["try"]["model.safetensors"] == back["model.safetensors"]
    assert "Me/other" in hub.private and "model.safetensors" not in hub.revisions["Me/other"]["main"]


def test_adapters_do_not_drive_a_model_out(model: Path, hub: Hub, tmp_path: Path) -> None:
    for name, content in (("adapter_config.json", b"{}"), ("adapter_model.safetensors", b"adapters")):
        (tmp_path / name).write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HF_TOKEN", TOKEN)
        upload_model(tmp_path, Repository(NAME))
    assert {"model.safetensors", "adapter_model.safetensors"} <= set(hub.revisions[NAME]["main"])


def test_what_did_not_agree_is_not_uploaded(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setattr("megatron.commands.convert._verify", lambda *_: 1)
    convert(model, "hf://Me/new", "--verify", "text", code=1)
    assert "hf://Me/new: not uploaded" in capsys.readouterr().out and "Me/new" not in hub.revisions


def test_inspect_reads_it_too(model: Path, hub: Hub, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", ADDRESS, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["model"]


def test_planning_needs_no_weights(model: Path, hub: Hub) -> None:
    config = load_config(None, ["--model.init_from", f"{ADDRESS}@main"])
    assert describe_model(config)[0] == shrunk_model(config) == ModelConfig.from_huggingface(CONFIG)
    assert "config.json" in hub.fetched() and "model.safetensors" not in hub.fetched()


def test_training_begins_from_it(model: Path, hub: Hub) -> None:
    world = World(Launch(), torch.device("cpu"), Axis("control"))
    origin = find_origin(load_config(None, ["--model.init_from", ADDRESS]), world)
    assert origin.source is not None and origin.source.weight_files == ["model.safetensors"]
    origin.source.close()


def test_a_name_without_a_folder_is_answered_with_the_address(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for words in (
        ["convert", NAME, "x"],
        ["inspect", NAME],
        ["evaluate", "--load", NAME, "--data", "x"],
        ["plan", "--gpus", "1", "--model.init_from", NAME],
    ):
        assert main(words) == 2
        assert f"write hf://{NAME}" in capsys.readouterr().err
    (tmp_path / "Some").mkdir()
    assert spelling_hint(NAME) == spelling_hint("model") == spelling_hint("/a/b") == spelling_hint("a/b/c") == ""


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("hf://a/b", ("a/b", None)),
        ("hf:/a/b/", ("a/b", None)),
        ("hf://gpt2@v1.0", ("gpt2", "v1.0")),
        ("hf://a/b@refs/pr/3", ("a/b", "refs/pr/3")),
        ("a/b", None),
        ("/hf:/a/b", None),
    ],
)
def test_an_address_is_read(text: str, meant: tuple[str, str | None] | None) -> None:
    assert parse_address(text) == (None if meant is None else Repository(*meant))
    assert parse_address(Path(text)) == parse_address(text)


@pytest.mark.parametrize(
    "text", ["hf://", "hf://a/b/c", "hf://a/b@", "hf://a b/c", "hf://../b", "hf://a--b/c", "hf://@x"]
)
def test_a_bad_address_is_an_error(text: str) -> None:
    with pytest.raises(ConfigError, match="write hf://owner/name"):
        parse_address(text)


def test_a_damage_in_the_cache_is_found(
    model: Path, hub: Hub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cache names large files after their SHA-256."""
    assert main(["inspect", ADDRESS, "--verify"]) == 0
    assert "the checksums of all 1 files are right" in capsys.readouterr().out
    file = fetch_model(Repository(NAME)) / "model.safetensors"
    with open(file.resolve(), "r+b") as opened:
        opened.seek(-1, os.SEEK_END)
        last = opened.read(1)[0]
        opened.seek(-1, os.SEEK_END)
        opened.write(bytes([last ^ 1]))
    for words in (["inspect", ADDRESS, "--verify"], ["convert", ADDRESS, str(tmp_path / "o")]):
        assert main(words) == 2
        assert f"Delete {file.resolve()} and fetch the model again" in capsys.readouterr().err
    file.resolve().unlink()
    convert(ADDRESS, tmp_path / "o")
