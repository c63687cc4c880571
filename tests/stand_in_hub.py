"""A stand-in of the Hugging Face hub on this machine: the part of its HTTP interface that its client uses for models.

Large files (safetensors, bin, pth) are kept apart under their SHA-256 and reached by a redirect, as LFS files are;
others are given and taken within the requests themselves. Faults are set on the object: `cut`, `closed`, `busy`.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

TOKEN = "hf_good"  # of an account that may read and write everything
READ_TOKEN = "hf_reader"  # of one that may write nothing
LARGE = (".safetensors", ".bin", ".pth", ".pt")
_NAME = r"(?P<name>[\w.-]+(?:/[\w.-]+)?)"


@dataclass
class Hub:
    """What is on the hub, what was asked of it, and what goes wrong."""

    revisions: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # name -> branch or tag -> files
    private: set[str] = field(default_factory=set)  # who has no token does not learn that they exist
    gated: set[str] = field(default_factory=set)  # their files need a token
    blobs: dict[str, bytes] = field(default_factory=dict)  # SHA-256 -> content that was uploaded
    asked: list[tuple[str, str, str]] = field(default_factory=list)  # method, path, Range
    tokens: set[str | None] = field(default_factory=set)
    cut: dict[str, list[int]] = field(default_factory=dict)  # file -> after how many bytes each answer breaks off
    closed: bool = False  # every answer is an error of the server's
    port: int = 0

    @property
    def endpoint(self) -> str:
        return f"http://localhost:{self.port}"

    def publish(self, name: str, folder: Path, revision: str = "main", without: tuple[str, ...] = ()) -> None:
        """Put the files of a folder (and of folders in it) on the hub."""
        files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        kept = {path: content for path, content in files.items() if path not in without}
        self.revisions.setdefault(name, {})[revision] = kept

    def commit(self, name: str, revision: str) -> str | None:
        """The commit that a branch, tag or commit of a model means; None where it has none such."""
        commits = {branch: _commit_of(files) for branch, files in self.revisions[name].items()}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, name: str, commit: str) -> dict[str, bytes]:
        return next(files for files in self.revisions[name].values() if _commit_of(files) == commit)

    def fetched(self) -> list[str]:
        """The files whose content was asked for, in order."""
        return [path.rpartition("/")[2] for method, path, _ in self.asked if method == "GET" and "/api/" not in path]

    def environment(self, home: Path) -> dict[str, str]:
        """The variables for a process that is to use this hub."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_HUB_OFFLINE": "0",
            "TRANSFORMERS_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }


def _commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(repr(sorted((name, _sha256(content)) for name, content in files.items())).encode()).hexdigest()


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _entry(path: str, content: bytes, key: str) -> dict[str, object]:
    """A file as lists of a repository's files describe it."""
    large = {"sha256": _sha256(content), "oid": _sha256(content), "size": len(content), "pointerSize": 130}
    entry = {key: path, "size": len(content), "oid": _blob(content), "blobId": _blob(content), "type": "file"}
    return entry | ({"lfs": large} if path.endswith(LARGE) else {})


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer_to("HEAD")

    def do_GET(self) -> None:
        self._answer_to("GET")

    def do_POST(self) -> None:
        self._answer_to("POST")

    def do_PUT(self) -> None:
        self._answer_to("PUT")

    def log_message(self, *_: object) -> None:
        """Nothing is logged."""

    def _answer_to(self, method: str) -> None:
        path = urlsplit(self.path).path
        self.body = self._read_body()
        self.hub.asked.append((method, path, self.headers.get("Range", "")))
        self.hub.tokens.add(self.headers.get("Authorization"))
        if self.hub.closed:
            return self._fail(503, "", "closed")
        for verb, pattern, action in _ROUTES:
            if verb == method and (match := re.fullmatch(pattern, path)):
                return action(self, **{key: unquote(text) for key, text in match.groupdict().items()})
        return self._fail(404, "", f"no such route: {method} {path}")

    # What is read

    def model(self, name: str, revision: str = "main") -> None:
        commit = self._known(name, revision)
        if commit:
            siblings = [_entry(path, content, "rfilename") for path, content in self.hub.files(name, commit).items()]
            self._send_json({"id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []})

    def tree(self, name: str, revision: str) -> None:
        commit = self._known(name, revision)
        if commit:
            self._send_json([_entry(path, content, "path") for path, content in self.hub.files(name, commit).items()])

    def resolve(self, name: str, revision: str, path: str) -> None:
        commit = self._known(name, revision, content=True)
        if not commit:
            return None
        content = self.hub.files(name, commit).get(path)
        if content is None:
            return self._fail(404, "EntryNotFound", "no such file")
        about = {"X-Repo-Commit": commit}
        if path.endswith(LARGE):
            self.hub.blobs[_sha256(content)] = content
            # Under another name of this machine, since the client does not follow redirects to other hosts at once.
            address = f"http://127.0.0.1:{self.hub.port}/large/{_sha256(content)}/{path}"
            linked = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{_sha256(content)}"'}
            return self._send(302, b"", about | linked | {"Location": address})
        return self._send_file(path, content, about | {"ETag": f'"{_blob(content)}"'})

    def large(self, sha256: str, path: str) -> None:
        content = self.hub.blobs[sha256]
        self._send_file(path, content, {"ETag": f'"{sha256}"'})

    # What is written

    def whoami(self) -> None:
        token = self.headers.get("Authorization")
        if token in (f"Bearer {TOKEN}", f"Bearer {READ_TOKEN}"):
            role = "write" if token == f"Bearer {TOKEN}" else "read"
            return self._send_json({"name": "Me", "type": "user", "auth": {"accessToken": {"role": role}}})
        return self._fail(401, "", "Invalid username or password.")

    def create(self) -> None:
        if self._may_write():
            wanted = json.loads(self.body)
            name = "/".join(filter(None, (wanted.get("organization"), wanted["name"])))
            address = {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name}
            if name in self.hub.revisions:
                return self._send_json(address, 409)
            self.hub.revisions[name] = {"main": {".gitattributes": b"*.safetensors filter=lfs\n"}}
            if wanted.get("private") or wanted.get("visibility") == "private":  # as the client's version says it
                self.hub.private.add(name)
            self._send_json(address)
        return None

    def branch(self, name: str, revision: str) -> None:
        if self._may_write() and self._known(name, "main"):
            existed = revision in self.hub.revisions[name]
            self.hub.revisions[name].setdefault(revision, dict(self.hub.revisions[name]["main"]))
            self._send_json({}, 409 if existed else 200)

    def preupload(self, name: str, revision: str) -> None:
        if self._may_write() and self._known(name, revision):
            names = [file["path"] for file in json.loads(self.body)["files"]]
            modes = [
                {"path": path, "uploadMode": "lfs" if path.endswith(LARGE) else "regular", "shouldIgnore": False}
                for path in names
            ]
            self._send_json({"files": modes})

    def batch(self, name: str) -> None:
        if self._may_write():
            objects = []
            for wanted in json.loads(self.body)["objects"]:
                href = f"{self.hub.endpoint}/upload/{wanted['oid']}"
                there = wanted["oid"] in self.hub.blobs
                objects.append(wanted if there else wanted | {"actions": {"upload": {"href": href}}})
            self._send_json({"transfer": "basic", "objects": objects})

    def put(self, sha256: str) -> None:
        if sha256 != _sha256(self.body):
            return self._fail(400, "", "the content has another SHA-256")
        self.hub.blobs[sha256] = self.body
        return self._send(200, b"", {})

    def commit(self, name: str, revision: str) -> None:
        if self._may_write() and self._known(name, revision):
            files = dict(self.hub.revisions[name][revision])
            for line in map(json.loads, self.body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.hub.blobs[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            self.hub.revisions[name][revision] = files
            commit = _commit_of(files)
            self._send_json(
                {"success": True, "commitOid": commit, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{commit}"}
            )

    # Rules and answers

    def _known(self, name: str, revision: str, content: bool = False) -> str | None:
        """The commit, or None once the error is sent."""
        trusted = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if name not in self.hub.revisions or (name in self.hub.private and not trusted):
            self._fail(404 if trusted else 401, "RepoNotFound", "Repository not found")
        elif content and name in self.hub.gated and not trusted:
            denied = 401 if self.headers.get("Authorization") is None else 403
            self._fail(denied, "GatedRepo", f"Access to model {name} is restricted")
        elif (commit := self.hub.commit(name, revision)) is None:
            self._fail(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return commit
        return None

    def _may_write(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self._fail(401, "", "Invalid username or password.")
        return False

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send_file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        ends = self.hub.cut.get(path) if self.command == "GET" else None
        self._send(206 if wanted else 200, content[start:], headers, ends.pop(0) if ends else None)

    def _send_json(self, content: object, status: int = 200) -> None:
        self._send(status, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _fail(self, status: int, code: str, message: str) -> None:
        headers = {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        self._send(status, json.dumps({"error": message}).encode(), headers)

    def _send(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[:cut])
        self.close_connection = self.close_connection or cut is not None


_ROUTES = (
    ("GET", rf"/api/models/{_NAME}", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/revision/(?P<revision>.+)", _Handler.model),
    ("GET", rf"/api/models/{_NAME}/tree/(?P<revision>.+)", _Handler.tree),
    *((verb, rf"/{_NAME}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", _Handler.resolve) for verb in ("HEAD", "GET")),
    *((verb, r"/large/(?P<sha256>\w+)/(?P<path>.+)", _Handler.large) for verb in ("HEAD", "GET")),
    ("GET", r"/api/whoami-v2", _Handler.whoami),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{_NAME}/branch/(?P<revision>.+)", _Handler.branch),
    ("POST", rf"/api/models/{_NAME}/preupload/(?P<revision>.+)", _Handler.preupload),
    ("POST", rf"/{_NAME}\.git/info/lfs/objects/batch", _Handler.batch),
    ("PUT", r"/upload/(?P<sha256>\w+)", _Handler.put),
    ("POST", rf"/api/models/{_NAME}/commit/(?P<revision>.+)", _Handler.commit),
)


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers at its `endpoint`."""
    hub = Hub()
    server = ThreadingHTTPServer(("localhost", 0), type("Handler", (_Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.port = server.server_port
    thread = Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def redirect_client(patch: pytest.MonkeyPatch, hub: Hub, home: Path, offline: bool = False) -> None:
    """Let the client in this process use the hub and a cache of its own: it has read its variables already."""
    from huggingface_hub import constants

    patch.setattr(constants, "ENDPOINT", hub.endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_OFFLINE", offline)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.delenv("HF_TOKEN", raising=False)
