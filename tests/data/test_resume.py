"""Killed, out of disk or changed under its hands, preprocessing goes on to the same bytes or says why it does not."""

from __future__ import annotations

import json
import logging
import random
import resource
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest

from megatron.data.preprocess import PreprocessOptions, journal, preprocess, reading, run
from megatron.data.preprocess.journal import only_run
from megatron.data.preprocess.quarantine import parse_budget
from megatron.utils.errors import ConfigError, DataError, ResourceError

from .killing import command, kill_and_go_on, make_inputs, outcome


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return make_inputs(tmp_path_factory.mktemp("inputs"), 6_000)


@pytest.fixture
def options(
    tmp_path: Path, inputs: list[Path], tiny_tokenizer: Path, monkeypatch: pytest.MonkeyPatch
) -> PreprocessOptions:
    monkeypatch.setattr(reading.read_chunks, "__defaults__", (20_000,))
    monkeypatch.setattr(journal, "RECORD_EVERY_S", 0.0)
    budget = parse_budget("5%")
    return PreprocessOptions(
        tuple(inputs), str(tmp_path / "p"), tiny_tokenizer, json_keys=("q", "a"), append_eod=True, max_bad_lines=budget
    )


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory, inputs: list[Path], tiny_tokenizer: Path) -> dict[str, bytes]:
    """What a run that nothing disturbs leaves."""
    prefix = tmp_path_factory.mktemp("quiet") / "quiet"
    budget = parse_budget("5%")
    preprocess(
        PreprocessOptions(
            tuple(inputs), str(prefix), tiny_tokenizer, json_keys=("q", "a"), append_eod=True, max_bad_lines=budget
        )
    )
    return outcome(prefix)


class Stopped(BaseException):
    """Stands for what ends a run."""


def stop_after(monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    """Have runs end after so many chunks."""
    add, count = run._Run._add, [0]

    def counting(self: run._Run, *words: object) -> None:
        count[0] += 1
        if count[0] > chunks:
            raise Stopped
        add(self, *words)  # type: ignore[arg-type]
        self._recorder.wait()

    monkeypatch.setattr(run._Run, "_add", counting)


def test_killed_at_random_moments_the_result_is_the_same(
    tmp_path: Path, inputs: list[Path], tiny_tokenizer: Path, expected: dict[str, bytes]
) -> None:
    draw = random.Random(5)
    for workers in (1, 2):
        prefix = tmp_path / f"w{workers}"
        kill_and_go_on(command(inputs, prefix, tiny_tokenizer, workers), draw, 2.5, 4)
        assert outcome(prefix) == expected


@pytest.mark.parametrize("chunks", [1, 3, 7, 20, 33])
def test_stopped_anywhere_it_goes_on(
    options: PreprocessOptions, expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, chunks: int,
) -> None:  # fmt: skip
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, chunks)
        preprocess(options)
    assert any(name.endswith(".progress.json") for name in outcome(Path(options.output_prefix)))
    for partial in Path(options.output_prefix).parent.glob("*.partial"):
        partial.write_bytes(partial.read_bytes() + b"written after the last record")
    with caplog.at_level(logging.INFO, logger="megatron"):
        preprocess(replace(options, workers=2))  # with other workers, which change nothing
    assert "going on after" in caplog.text
    assert outcome(Path(options.output_prefix)) == expected


@pytest.mark.parametrize("step", range(12))
def test_stopped_while_names_are_given_it_goes_on(
    options: PreprocessOptions, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
) -> None:
    (corpus := tmp_path / "small.jsonl").write_text('{"q": "pain", "a": "rest"}\n[]\n' * 20)
    options = replace(options, inputs=(corpus,), max_bad_lines=parse_budget("50%"))
    preprocess(replace(options, output_prefix=str(tmp_path / "quiet")))
    preprocess(replace(options, append_eod=False))  # an earlier pair, which is replaced
    for name in ("replace", "unlink"):
        original = getattr(Path, name)
        with monkeypatch.context() as patch:
            count = [0]

            def stopping(self: Path, *words: object, original=original, count=count, **more: object) -> object:
                if ".progress" not in self.name and ".lock" not in self.name and ".tmp" not in self.name:
                    count[0] += 1
                    if count[0] > step:
                        raise Stopped
                return original(self, *words, **more)

            patch.setattr(Path, name, stopping)
            try:
                preprocess(options)
            except Stopped:
                assert not incoherent(Path(options.output_prefix))
    preprocess(options)
    assert outcome(Path(options.output_prefix)) == outcome(tmp_path / "quiet")


def incoherent(prefix: Path) -> list[str]:
    """Indices beside tokens that they do not describe."""
    from megatron.data.indexed import IndexedReader

    wrong = []
    for idx in prefix.parent.glob(f"{prefix.name}*.idx"):
        try:
            IndexedReader(idx)
        except DataError as error:
            wrong += [str(error)] if "is missing" not in str(error) else []
    return wrong


def stop_once(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch, chunks: int) -> None:
    with monkeypatch.context() as patch, pytest.raises(Stopped):
        stop_after(patch, chunks)
        preprocess(options)


def test_other_options_or_inputs_are_refused_and_restart_begins_again(
    options: PreprocessOptions, inputs: list[Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    stop_once(options, monkeypatch, 35)  # in the second file
    before = outcome(Path(options.output_prefix))
    for change, said in (
        ({"append_eod": False}, r"other options \(append_eod was True, is False\)"),
        ({"json_keys": ("a", "q")}, r"json_keys was \['q', 'a'\], is \['a', 'q'\]"),
        ({"inputs": tuple(inputs[1:])}, "over other inputs .input 1: .*a.jsonl is now .*b.jsonl.gz"),
        ({"inputs": tuple(inputs[:1])}, "input 2: .*b.jsonl.gz is now missing"),
    ):
        with pytest.raises(ConfigError, match=said + r".*add --restart"):
            preprocess(replace(options, **change))
        assert outcome(Path(options.output_prefix)) == before
    preprocess(replace(options, append_eod=False, restart=True))
    preprocess(options)
    assert outcome(Path(options.output_prefix)) == expected


def test_a_file_that_was_changed_is_read_again_if_nothing_else_was_read_since(
    options: PreprocessOptions, inputs: list[Path], expected: dict[str, bytes], monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture, tmp_path: Path,
) -> None:  # fmt: skip
    own = [tmp_path / file.name for file in inputs]
    for file, copy in zip(inputs, own, strict=True):
        copy.write_bytes(file.read_bytes())
    half = len(inputs[1].read_bytes()) // 2
    own[1].write_bytes(inputs[1].read_bytes()[:half])
    options = replace(options, inputs=tuple(own))
    with pytest.raises(DataError, match=r"b.jsonl.gz is damaged or cut short"):
        preprocess(options)
    own[1].write_bytes(inputs[1].read_bytes())  # mended
    with caplog.at_level(logging.INFO, logger="megatron"):
        preprocess(options)
    assert "b.jsonl.gz has changed since it was read in part" in caplog.text
    found = outcome(Path(options.output_prefix))
    assert {name for name in expected if name.endswith((".bin", ".idx")) and found[name] != expected[name]} == set()
    stop_once(options, monkeypatch, 35)
    own[0].touch()
    with pytest.raises(ConfigError, match=r"input 1: .*a.jsonl has changed"):
        preprocess(options)


def test_a_damaged_record_is_refused(options: PreprocessOptions, monkeypatch: pytest.MonkeyPatch) -> None:
    stop_once(options, monkeypatch, 5)
    path = Path(f"{options.output_prefix}.progress.json")
    for content in ("{", "[]", '{"format": 9}', json.dumps({"format": 1})):
        path.write_text(content)
        with pytest.raises(DataError, match=r"not a record of a run that can be continued .*--restart"):
            preprocess(options)
    path.unlink()
    for end in ("_q_document.bin", "_a_document.idx", "_q_document.lines", ".quarantine.jsonl"):
        stop_once(replace(options, restart=True), monkeypatch, 40)
        partial = Path(f"{options.output_prefix}{end}.partial")
        partial.write_bytes(partial.read_bytes()[:10])
        with pytest.raises(DataError, match=r"cannot be gone on with: .*it was cut short; add --restart"):
            preprocess(options)
        partial.unlink()
        with pytest.raises(DataError, match=r"cannot be gone on with: .*No such file .*; add --restart"):
            preprocess(options)


def test_a_second_run_on_the_same_output_is_refused(options: PreprocessOptions) -> None:
    with only_run(options.output_prefix), pytest.raises(ResourceError, match=r"another run is writing .*p_\*"):
        preprocess(options)
    Path(f"{options.output_prefix}.lock").touch()  # left by a run that was killed
    preprocess(options)
    assert not Path(f"{options.output_prefix}.lock").exists()


def test_on_a_full_disk_what_was_done_is_kept(
    options: PreprocessOptions, inputs: list[Path], tmp_path: Path, expected: dict[str, bytes]
) -> None:
    words = command(inputs, tmp_path / "p", options.tokenizer, 2)
    limited = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, 150_000))\n"
    process = subprocess.run([*words[:2], limited + words[2], *words[3:]], capture_output=True, text=True, timeout=120)
    assert process.returncode == 2, process.stderr
    assert "failed: File too large" in process.stderr and "Traceback" not in process.stderr
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert outcome(tmp_path / "p") == expected


def test_a_killed_worker_loses_nothing(
    tmp_path: Path, inputs: list[Path], tiny_tokenizer: Path, expected: dict[str, bytes]
) -> None:
    words = command(inputs, tmp_path / "p", tiny_tokenizer, 2)
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not Path(f"{tmp_path}/p_q_document.bin.partial").exists():
        assert process.poll() is None and time.monotonic() < deadline
    children: list[str] = []
    while not children and process.poll() is None:
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    subprocess.run(["kill", "-9", *children[:1]], check=True)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 2 and "a worker process was killed by signal 9" in said and "Traceback" not in said
    subprocess.run(words, check=True, capture_output=True, timeout=120)
    assert outcome(tmp_path / "p") == expected


def test_what_is_piped_in_is_not_promised_to_go_on(options: PreprocessOptions, inputs: list[Path]) -> None:
    words = command([Path("-")], Path(options.output_prefix), options.tokenizer, 2)
    process = subprocess.run(words, stdin=open(inputs[0], "rb"), capture_output=True, timeout=120)  # noqa: SIM115
    assert process.returncode == 0, process.stderr
    assert b"can be read only once: an interrupted run cannot be continued" in process.stderr
    preprocess(replace(options, inputs=tuple(inputs[:1]), output_prefix=options.output_prefix + "2"))
    piped, read = outcome(Path(options.output_prefix + "_")), outcome(Path(options.output_prefix + "2_"))
    assert piped["q_document.bin"] == read["q_document.bin"]
    assert json.loads(piped["q_document.json"])["sources"][0]["file"] == "-"
