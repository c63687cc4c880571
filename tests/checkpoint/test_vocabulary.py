"""Tokens added in a conversion: rows, ids and tokenizer agree, and what the model had is untouched."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from megatron.__main__ import main
from megatron.checkpoint import vocabulary
from megatron.checkpoint.convert import convert
from megatron.checkpoint.source import open_source
from megatron.checkpoint.vocabulary import Extension
from megatron.model.config import ModelConfig
from megatron.model.specs import canonical_shapes
from megatron.parallel.layout import Region
from megatron.tokenizer import load_tokenizer
from megatron.utils.errors import ConfigError
from tests.tokenizer.conftest import train_sentencepiece

from .conftest import CONFIG

PIECES = 340
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Megatron-LLM's own tokens, then those of Meditron's corpus and of its chat form.
MEGATRON_LLM = ["<CLS>", "<SEP>", "<EOD>", "<MASK>", "<PAD>"]
CORPUS = [f"<corpus-{number}>" for number in range(12)]
CHAT = ["<|im_start|>", "<|im_end|>"]


def write_model(folder: Path, **changed: object) -> dict[str, torch.Tensor]:
    """A model with a tokenizer of 340 pieces; returns its weights."""
    folder.mkdir()
    config = {**CONFIG, "vocab_size": PIECES, **changed}
    shapes = canonical_shapes(ModelConfig.from_huggingface(config))
    generator = torch.Generator().manual_seed(3)
    weights = {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "tokenizer.model").write_bytes(train_sentencepiece())
    save_file(weights, folder / "model.safetensors")
    return weights


@pytest.fixture
def model(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    return tmp_path / "model", write_model(tmp_path / "model")


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    """All weights of any folder that the program reads."""
    with open_source(folder) as source:
        found = {}
        for name, shape in source.shapes().items():
            found[name] = torch.empty(shape, dtype=source.dtype(name))
            source.read(Region.whole(name, shape), found[name])
    return found


@pytest.mark.parametrize(
    ("to", "tensor", "pipeline"),
    [("native", None, None), ("native", 2, 2), ("huggingface", None, None), ("meta", 1, None), ("megatron-llm", 2, 1)],
)
def test_added_rows_are_the_mean_in_every_format_and_cut(model, tmp_path: Path, to, tensor, pipeline) -> None:
    source, weights = model
    tokens = (*MEGATRON_LLM, *CORPUS)
    convert(source, tmp_path / "to", to=to, tensor=tensor, pipeline=pipeline, extension=Extension(tokens))
    found = read_weights(tmp_path / "to")
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        if name not in (EMBEDDING, HEAD):
            assert torch.equal(found[name], weight), name
            continue
        assert found[name].shape == (PIECES + 17, 16)
        assert torch.equal(found[name][:PIECES], weight)
        mean = weight.double().mean(0).bfloat16()
        assert torch.equal(found[name][PIECES:], mean.expand(17, 16))
    tokenizer = load_tokenizer(tmp_path / "to")
    assert [tokenizer.token_id(token) for token in tokens] == list(range(PIECES, PIECES + 17))
    with open_source(tmp_path / "to") as opened:
        assert opened.model_config["vocab_size"] == tokenizer.vocab_size == PIECES + 17


def test_a_chain_of_conversions_extends_and_keeps(model, tmp_path: Path) -> None:
    """Meditron's way: 17 tokens, training, then two more for chat; and export leaves all as it is."""
    source, _ = model
    convert(source, tmp_path / "a", extension=Extension((*MEGATRON_LLM, *CORPUS)))
    convert(tmp_path / "a", tmp_path / "b", to="native", extension=Extension(tuple(CHAT), "copy"))
    convert(tmp_path / "b", tmp_path / "c", to="huggingface")
    before, after = read_weights(tmp_path / "a"), load_file(tmp_path / "c" / "model.safetensors")
    assert torch.equal(after[HEAD][: PIECES + 17], before[HEAD])
    assert torch.equal(after[HEAD][PIECES + 17 :], before[HEAD][-1:].expand(2, 16))
    assert json.loads((tmp_path / "c" / "config.json").read_text())["vocab_size"] == PIECES + 19
    ids = {token: PIECES + at for at, token in enumerate([*MEGATRON_LLM, *CORPUS, *CHAT])}
    assert json.loads((tmp_path / "c" / "added_tokens.json").read_text()) == ids
    assert load_tokenizer(tmp_path / "c").encode("<|im_end|>a<EOD>")[0] == PIECES + 18


def test_tied_models_get_rows_once(tmp_path: Path) -> None:
    weights = write_model(tmp_path / "model", tie_word_embeddings=True)
    convert(tmp_path / "model", tmp_path / "to", tensor=2, pipeline=2, extension=Extension(("<A>",), "normal"))
    found = read_weights(tmp_path / "to")
    assert found.keys() == weights.keys() and HEAD not in found
    assert found[EMBEDDING].shape == (PIECES + 1, 16)


def test_normal_rows_are_spread_as_the_columns_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weights = write_model(tmp_path / "model")
    scale = torch.arange(1.0, 17.0)
    weights[EMBEDDING] = (weights[EMBEDDING] * scale + 10 * scale).float()
    save_file({name: weight.float() for name, weight in weights.items()}, tmp_path / "model" / "model.safetensors")
    extension = Extension(tuple(f"<{number}>" for number in range(400)), "normal")
    convert(tmp_path / "model", tmp_path / "one", extension=extension)
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", 16 * 8 * 7)  # seven rows at a time
    convert(tmp_path / "model", tmp_path / "two", tensor=4, extension=extension)
    one, two = (read_weights(tmp_path / name)[EMBEDDING] for name in ("one", "two"))
    torch.testing.assert_close(one, two, rtol=1e-6, atol=0.0)
    old, new = one[:PIECES].double(), one[PIECES:].double()
    deviation = old.std(0, correction=0)
    assert ((new.mean(0) - old.mean(0)).abs() < 5 * deviation / 400**0.5).all()
    torch.testing.assert_close(new.std(0), deviation, rtol=0.2, atol=0.0)
    assert len(new.unique(dim=0)) == 400


def test_known_tokens_keep_their_ids_and_rows_that_are_there_are_kept(tmp_path: Path, caplog) -> None:
    """A model that was trained with added tokens, whose folder has the plain tokenizer only."""
    weights = write_model(tmp_path / "model", vocab_size=PIECES + 3)
    with caplog.at_level("INFO"):
        convert(tmp_path / "model", tmp_path / "to", to="native", extension=Extension(("</s>", "<A>", "<B>")))
    assert "already in the tokenizer, kept as they are there: </s> 2" in caplog.text
    assert "343 rows, those of all of the new tokens among them" in caplog.text
    found = read_weights(tmp_path / "to")
    assert all(torch.equal(found[name], weight) for name, weight in weights.items())
    assert load_tokenizer(tmp_path / "to").token_id("<B>") == PIECES + 1
    convert(tmp_path / "to", tmp_path / "more", to="native", extension=Extension(("<C>", "<D>")))
    assert read_weights(tmp_path / "more")[HEAD].shape[0] == PIECES + 4


@pytest.mark.parametrize(("to", "tensor"), [("huggingface", None), ("megatron-llm", 2)])
def test_rows_alone_are_added_and_left_out(model, tmp_path: Path, to, tensor) -> None:
    """As Megatron-LLM's resharder does, whose trainer names the tokens."""
    source, weights = model
    convert(
        source, tmp_path / "more", to=to, tensor=tensor, extension=Extension(initialization="copy", size=PIECES + 9)
    )
    more = read_weights(tmp_path / "more")
    for name in (EMBEDDING, HEAD):
        assert torch.equal(more[name][:PIECES], weights[name])
        assert torch.equal(more[name][PIECES:], weights[name][-1:].expand(9, 16))
    convert(tmp_path / "more", tmp_path / "fewer", to="native", tensor=4, extension=Extension(size=PIECES))
    fewer = read_weights(tmp_path / "fewer")
    assert fewer.keys() == weights.keys() and all(torch.equal(fewer[name], weight) for name, weight in weights.items())
    with pytest.raises(ConfigError, match="the tokenizer has 340 tokens, each of which needs a row"):
        convert(source, tmp_path / "to", extension=Extension(size=PIECES - 1))
    assert not (tmp_path / "to").exists()


def test_tokens_and_rows_together(model, tmp_path: Path, capsys) -> None:
    words = ["--extra-tokens", "<A>,<B>", "--vocab-size", str(PIECES + 24), "--initialize", "normal"]
    assert main(["convert", str(model[0]), str(tmp_path / "to"), *words]) == 0
    assert read_weights(tmp_path / "to")[HEAD].shape[0] == PIECES + 24
    assert load_tokenizer(tmp_path / "to").vocab_size == PIECES + 2
    assert main(["convert", str(model[0]), str(tmp_path / "o"), "--vocab-size", "0"]) == 2
    assert main(["convert", str(model[0]), str(tmp_path / "o"), *words[:2], "--vocab-size", str(PIECES + 1)]) == 2
    assert "give 342 or more" in capsys.readouterr().err


def test_what_cannot_be_is_an_error_with_the_cure(model, tmp_path: Path, capsys) -> None:
    source, _ = model
    (source / "tokenizer.model").unlink()
    assert main(["convert", str(source), str(tmp_path / "to"), "--extra-tokens", "<A>"]) == 2
    assert "copy its tokenizer.model" in capsys.readouterr().err
    assert main(["convert", str(source), str(tmp_path / "to"), "--initialize", "copy"]) == 2
    assert "--initialize is for the rows of --extra-tokens or --vocab-size" in capsys.readouterr().err
    words = ["--extra-tokens", "<A>", "--verify", str(tmp_path / "text")]
    assert main(["convert", str(source), str(tmp_path / "to"), *words]) == 2
    assert "verify a conversion of the result" in capsys.readouterr().err
    assert not (tmp_path / "to").exists()


@pytest.mark.parametrize("tokens", [("<A>", "<A>"), ("<A>", ""), ("\udcff",)])
def test_bad_tokens_are_refused(model, tmp_path: Path, tokens: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match="--extra-tokens"):
        convert(model[0], tmp_path / "to", extension=Extension(tokens))
    assert not (tmp_path / "to").exists()


def test_an_interrupted_extension_is_gone_on_with_by_the_same_alone(model, tmp_path: Path) -> None:
    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    partials = set()
    for extension in (None, Extension(("<A>",)), Extension(("<B>",)), Extension(("<A>",), "copy")):
        with pytest.raises(KeyboardInterrupt):
            convert(model[0], tmp_path / "to", to="native", extension=extension, progress=stop)
        partials |= {path.name for path in tmp_path.glob("to.*.partial")}
    assert len(partials) == 4
    convert(model[0], tmp_path / "to", to="native", extension=Extension(("<B>",)))
    assert load_tokenizer(tmp_path / "to").token_id("<B>") == PIECES


def test_meditrons_sizes(shared: Path, tmp_path: Path) -> None:
    """32,017 with the tokens of the corpus and 32,019 with those of the chat form, on a tokenizer of 32,000 pieces."""
    write_model(tmp_path / "model", vocab_size=32000, num_hidden_layers=1)
    shutil.copy(shared / "data/tokenizers/mistral_v1_tokenizer.model", tmp_path / "model" / "tokenizer.model")
    tokens = tmp_path / "tokens.txt"
    for name, listed, size in (("a", CORPUS, 32017), ("b", CORPUS + CHAT, 32019)):
        tokens.write_text("\n".join([*MEGATRON_LLM, *listed]))
        words = ["convert", tmp_path / "model", tmp_path / name, "--extra-tokens", tokens, "--tensor", 4]
        assert main([str(word) for word in words]) == 0
        tokenizer = load_tokenizer(tmp_path / name)
        assert tokenizer.vocab_size == size
        assert (tokenizer.token_id("<EOD>"), tokenizer.token_id(CORPUS[0])) == (32002, 32005)
        assert read_weights(tmp_path / name)[EMBEDDING].shape[0] == size
