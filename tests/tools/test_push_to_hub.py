"""Uploads, against a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.stand_in_hub import TOKEN, running_hub
from tools import push_to_hub

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K-untied"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real data in ../shared, which is not there")


def test_the_documented_line_uploads_the_folder(tmp_path: Path) -> None:
    with running_hub() as hub:
        line = f"tools/push_to_hub.py {STORIES} --hf_repo_name=Me/Model --auth_token={TOKEN}"
        done = subprocess.run(
            [sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True, timeout=100,
            env={**os.environ, **hub.environment(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        files = hub.revisions["Me/Model"]["main"]
        assert files["model.safetensors"] == (STORIES / "model.safetensors").read_bytes()
        assert "config.json" in files and "tokenizer.model" in files and "Me/Model" not in hub.private
        assert hub.tokens - {None} == {f"Bearer {TOKEN}"} and "better set HF_TOKEN" in done.stderr


def test_a_folder_is_written_with_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(STORIES), "--output_folder", str(tmp_path / "o"), "--rope_scaling_factor", "2", "--dtype", "bfloat16"]
    assert push_to_hub.main(words) == 0
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["rope_scaling"] == {"type": "linear", "factor": 2.0} and config["torch_dtype"] == "bfloat16"
    assert config["rope_parameters"]["rope_type"] == "linear" and config["rope_parameters"]["factor"] == 2.0
    words = [str(STORIES), "--output_folder", str(tmp_path / "cut"), "--max_shard_size"]
    assert push_to_hub.main([*words, "300KB"]) == 0
    sizes = [path.stat().st_size for path in (tmp_path / "cut").glob("model-*.safetensors")]
    assert len(sizes) > 1 and max(sizes) < 310_000
    assert push_to_hub.main([*words, "large"]) == 2
    for extra in (["--unsafe"], ["--hf_repo_name", "a/b/c/d"]):
        assert push_to_hub.main([str(STORIES), "--output_folder", str(tmp_path / "p"), *extra]) == 2
    assert push_to_hub.main([str(STORIES)]) == 2
    assert capsys.readouterr().err.count("push_to_hub.py: error: ") == 4
