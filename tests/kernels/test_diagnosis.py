"""`megatron doctor`: each "no" has its cure, and a library that crashes is a finding."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from megatron.__main__ import main
from megatron.kernels import diagnosis, native
from megatron.kernels.diagnosis import PROBES, Fact, Probe, diagnose, examine


def facts() -> dict[str, Fact]:
    return {fact.name: fact for fact in diagnose()}


def probe(program: str) -> Fact:
    return examine(Probe("x", ("json",), program, "the cure"))


def test_every_no_has_its_cure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(native, "find", lambda kind: (None, "they were not built"))
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(diagnosis, "cpu_multiplies_bfloat16", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda: True)
    monkeypatch.setattr(torch.cuda.nccl, "version", lambda: (2, 28, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = facts()
    no = {name for name, fact in found.items() if fact.good is False}
    assert no == {"CPU", "GPUs", "C++ compiler", "nvcc", "CPU kernels", "CUDA kernels"}
    assert all(found[name].cure for name in no)
    assert found["NCCL"].text == "2.28.9"
    assert found["nvcc"].cure == f"install the CUDA toolkit 13.0, then {diagnosis._REINSTALL}"
    assert "they were not built" in found["CPU kernels"].text


def test_what_is_there_is_said() -> None:
    found = facts()
    library, reason = native.find("cpu")
    assert found["torch"].text == torch.__version__
    assert found["CPU kernels"].good is (library is not None) and reason in found["CPU kernels"].text
    assert {probe.name for probe in PROBES} <= set(found)


def test_gpus_are_described(monkeypatch: pytest.MonkeyPatch) -> None:
    class Properties:
        name, total_memory = "NVIDIA A100-SXM4-80GB", 80 * 2**30

    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0) if device.index == 0 else (7, 0))
    gpus = [fact for fact in diagnosis._devices() if fact.name.startswith("GPU")]
    assert [(fact.name, fact.good) for fact in gpus] == [("GPU 0", True), ("GPU 1", False)]
    assert gpus[0].text == "NVIDIA A100-SXM4-80GB, 80.0 GiB, compute capability 8.0"
    assert gpus[1].cure is not None


def test_the_users_compiler_is_the_one_that_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert facts()["C++ compiler"].text == "CXX=no-such-compiler is not there"


def test_libraries_are_imported_elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe("print('1.2.3')") == Fact("x", True, "1.2.3")
    assert probe("raise OSError('libx.so: undefined symbol')") == Fact(
        "x", False, "does not load: OSError: libx.so: undefined symbol", "the cure"
    )
    crash = probe("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    assert crash == Fact("x", False, "importing it crashes Python (SIGSEGV)", "the cure")
    assert examine(Probe("x", ("no_such_module",), "", "")) == Fact("x", None, "not installed; optional")
    monkeypatch.setattr(diagnosis, "_IMPORT_TIMEOUT_S", 0.2)
    assert "took more than" in probe("import time; time.sleep(60)").text


def test_the_apex_of_pypi_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex").mkdir()
    (tmp_path / "apex" / "__init__.py").write_text("")
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (apex,) = (one for one in PROBES if one.name == "NVIDIA apex")
    found = examine(apex)
    assert found.good is False and "No module named 'apex.normalization'" in found.text
    assert found.cure is not None and "PyPI" in found.cure


def test_the_command_prints_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    table = capsys.readouterr().out
    assert main(["doctor", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)["facts"]
    assert [fact["name"] for fact in listed][:2] == ["Python", "torch"]
    for fact in listed:
        assert f"{fact['text']}\n" in table and (fact["cure"] is None or f"-> {fact['cure']}\n" in table)


def test_a_tool_that_does_not_run_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: object, **options: object) -> None:
        raise OSError

    monkeypatch.setattr(subprocess, "run", fail)
    assert diagnosis._first_line(["x"]) == "does not run"
