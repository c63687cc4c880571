"""Uploads, against a stand-in of the hub's HTTP interface on this machine."""

from __future__ import annotations

import base64
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest

from tools import push_to_hub

ROOT = Path(__file__).resolve().parents[2]
STORIES = ROOT.parent / "shared/data/stories260K-untied"
pytestmark = pytest.mark.skipif(not STORIES.is_dir(), reason="needs the real data in ../shared, which is not there")


class Hub(BaseHTTPRequestHandler):
    """Takes every file within the commit, as the hub takes small ones."""

    files: dict[str, bytes]
    tokens: set[str | None]

    def do_POST(self) -> None:
        coding = self.headers.get("Transfer-Encoding", "")
        body = self.chunks() if "chunked" in coding else self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.tokens.add(self.headers.get("Authorization"))
        address = f"http://localhost:{self.server.server_port}/Me/Model"
        answer: dict = {"url": address, "name": "Me/Model"}
        if "/preupload/" in self.path:
            wanted = json.loads(body)["files"]
            answer = {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]}
        elif "/commit/" in self.path:
            lines = [json.loads(line) for line in body.splitlines() if line]
            contents = [line["value"] for line in lines if line["key"] == "file"]
            self.files.update({value["path"]: base64.b64decode(value["content"]) for value in contents})
            answer = {"commitUrl": f"{address}/commit/abc", "commitOid": "abc", "success": True}
        self.answer(answer)

    def do_GET(self) -> None:
        self.answer({"id": "Me/Model", "siblings": [], "sha": "abc"})

    def chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        return body

    def answer(self, content: dict) -> None:
        text = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""


@pytest.fixture
def hub() -> Iterator[ThreadingHTTPServer]:
    Hub.files, Hub.tokens = {}, set()
    server = ThreadingHTTPServer(("localhost", 0), Hub)
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_the_documented_line_uploads_the_folder(hub: ThreadingHTTPServer, tmp_path: Path) -> None:
    environment = {
        "HF_ENDPOINT": f"http://localhost:{hub.server_port}",
        "HF_HUB_OFFLINE": "0",
        "HF_HOME": str(tmp_path),
    }
    line = f"tools/push_to_hub.py {STORIES} --hf_repo_name=Me/Model --auth_token=MyAuthToken"
    done = subprocess.run(
        [sys.executable, *line.split()], cwd=ROOT, capture_output=True, text=True, timeout=100,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Hub.files["model.safetensors"] == (STORIES / "model.safetensors").read_bytes()
    assert "config.json" in Hub.files and "tokenizer.model" in Hub.files
    assert Hub.tokens == {"Bearer MyAuthToken"} and "better set HF_TOKEN" in done.stderr


def test_a_folder_is_written_with_scaling(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(STORIES), "--output_folder", str(tmp_path / "o"), "--rope_scaling_factor", "2", "--dtype", "bfloat16"]
    assert push_to_hub.main(words) == 0
    config = json.loads((tmp_path / "o/config.json").read_text())
    assert config["rope_scaling"]["factor"] == 2.0 and config["torch_dtype"] == "bfloat16"
    for extra in (["--unsafe"], ["--hf_repo_name", "a/b/c/d"]):
        assert push_to_hub.main([str(STORIES), "--output_folder", str(tmp_path / "p"), *extra]) == 2
    assert push_to_hub.main([str(STORIES)]) == 2
    assert capsys.readouterr().err.count("push_to_hub.py: error: ") == 3
