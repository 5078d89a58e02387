"""A hub on this machine: what huggingface_hub calls of the hub's protocol, in memory.

Repositories, commits (regular and LFS files), resolving with ETags, access, and faults on demand.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote

TOKEN = "hf_owner"
LARGE = 1000  # bytes from which a file is LFS


@dataclass
class Repository:
    """Branches of files; each commit replaces a branch's dict."""

    private: bool = False
    gated: bool = False
    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        self.branches[branch] = files
        sha = hashlib.sha1(repr((branch, len(self.commits), sorted(files))).encode()).hexdigest()
        self.commits[sha] = files
        return sha

    def head(self, revision: str) -> str | None:
        if revision in self.commits:
            return revision
        if revision not in self.branches:
            return None
        return next((sha for sha, files in reversed(self.commits.items()) if files is self.branches[revision]), "0" * 40)


class Hub(ThreadingHTTPServer):
    """`fault(method, path)` may return a status to answer with instead."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # LFS contents by SHA-256
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.fault: Any = lambda method, path: None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, status: int, content: Any = b"", **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def error(self, status: int, code: str) -> None:
        self.answer(status, {"error": code}, X_Error_Code=code, X_Error_Message=code)

    def handle_request(self) -> None:
        hub = self.server
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path, _, query = self.path.partition("?")
        hub.requests.append((self.command, path))
        if (status := hub.fault(self.command, path)) is not None:
            self.error(status, "Fault")
            return
        owner = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if path == "/api/repos/create":
            self.create(json.loads(body), owner)
        elif path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.command == "PUT":
            data = body
            assert hashlib.sha256(data).hexdigest() == path.rpartition("/")[2]
            hub.objects[path.rpartition("/")[2]] = data
            hub.uploads.append(path.rpartition("/")[2])
            self.answer(200)
        else:
            self.of_repository(path, query, body, owner)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def create(self, about: dict[str, Any], owner: bool) -> None:
        hub, name = self.server, f"{about['organization']}/{about['name']}"
        if not owner:
            self.error(401, "Unauthorized")
        elif about["organization"] == "stranger":
            self.error(403, "Forbidden")
        elif name in hub.repositories:
            self.answer(409, {"url": f"{hub.address}/{name}"})
        else:
            private = bool(about.get("private")) or about.get("visibility") == "private"
            hub.repositories[name] = Repository(private)
            self.answer(200, {"url": f"{hub.address}/{name}"})

    def of_repository(self, path: str, query: str, body: bytes, owner: bool) -> None:
        hub = self.server
        match = re.fullmatch(r"/(?:api/models/)?([^/]+/[^/]+?)(?:\.git)?(/.*)?", path)
        assert match is not None, path
        name, rest = match[1], unquote(match[2] or "")
        repository = hub.repositories.get(name)
        if repository is None or (repository.private and not owner):
            self.error(404 if owner else 401, "RepoNotFound")
        elif repository.gated and not owner and rest.startswith("/resolve"):
            self.error(403, "GatedRepo")
        elif rest == "/info/lfs/objects/batch":
            objects = [
                {"oid": each["oid"], "size": each["size"]}
                | ({} if each["oid"] in hub.objects else {"actions": {"upload": {"href": f"{hub.address}/upload/{each['oid']}"}}})
                for each in json.loads(body)["objects"]
            ]
            self.answer(200, {"transfer": "basic", "objects": objects})
        elif route := re.fullmatch(r"/preupload/(.+)", rest):
            files = [
                {"path": each["path"], "uploadMode": "lfs" if each["size"] >= LARGE else "regular", "shouldIgnore": False}
                for each in json.loads(body)["files"]
            ]
            self.answer(200, {"files": files})
        elif route := re.fullmatch(r"/branch/(.+)", rest):
            if route[1] in repository.branches:
                self.answer(409, {"error": "Reference already exists"})
            else:
                repository.branches[route[1]] = repository.branches["main"]
                self.answer(200, {})
        elif route := re.fullmatch(r"/commit/(.+)", rest):
            self.commit(name, repository, route[1], body)
        elif route := re.fullmatch(r"/resolve/([^/]+)/(.+)", rest):
            self.resolve(repository, route[1], route[2])
        else:
            route = re.fullmatch(r"(?:/revision/(.+))?", rest)
            assert route is not None, path
            self.about(name, repository, route[1] or "main")

    def about(self, name: str, repository: Repository, revision: str) -> None:
        sha = repository.head(revision)
        if sha is None:
            self.error(404, "RevisionNotFound")
            return
        files = repository.commits.get(sha, {})
        siblings = [
            {"rfilename": path, "size": len(data), "blobId": hashlib.sha1(data).hexdigest()}
            | ({"lfs": {"size": len(data), "sha256": hashlib.sha256(data).hexdigest(), "pointerSize": 130}} if len(data) >= LARGE else {})
            for path, data in files.items()
        ]
        self.answer(200, {"id": name, "sha": sha, "siblings": siblings, "private": repository.private, "tags": []})

    def commit(self, name: str, repository: Repository, branch: str, body: bytes) -> None:
        files = dict(repository.branches[branch])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repository.commit(branch, files)
        self.answer(200, {"commitUrl": f"{self.server.address}/{name}/commit/{sha}", "commitOid": sha, "success": True})

    def resolve(self, repository: Repository, revision: str, path: str) -> None:
        sha = repository.head(revision)
        if sha is None:
            self.error(404, "RevisionNotFound")
            return
        data = repository.commits.get(sha, {}).get(path)
        if data is None:
            self.error(404, "EntryNotFound")
            return
        self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=sha)


@contextmanager
def running() -> Iterator[Hub]:
    """A hub that serves until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
