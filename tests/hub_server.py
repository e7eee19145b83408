"""A small local stand-in for the Hugging Face Hub, as far as huggingface_hub's client asks it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlparse

TOKEN = "hf_stand_in"
_MODEL = re.compile(r"/api/models/([\w.-]+/[\w.-]+)(?:/(\w+)/(.+))?")
_FILE = re.compile(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)")


class Repository:
    """Files by commit, and the commit of each branch."""

    def __init__(self, private: bool = False) -> None:
        self.private = private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.branches: dict[str, str] = {}
        self.messages: list[str] = []
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        new = {**self.files(branch), **files}
        digest = hashlib.sha1(f"{len(self.messages)}{branch}".encode()).hexdigest()
        self.commits[digest], self.branches[branch] = new, digest
        self.messages.append(message)
        return digest

    def files(self, revision: str) -> dict[str, bytes]:
        return self.commits.get(self.branches.get(revision, revision), {})


class Hub(ThreadingHTTPServer):
    """The server; ``repositories`` by name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.asked: list[str] = []
        self.private_by_default = False  # as an organisation may have it

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def put(self, name: str, files: dict[str, bytes]) -> Repository:
        """A repository with these files."""
        self.repositories[name] = repository = Repository()
        repository.commit("main", files, "put")
        return repository


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def refuse(self, status: int, code: str) -> None:
        self.answer({"error": code}, status, X_Error_Code=code, X_Error_Message=code)

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.server.asked.append(path)
        match = _MODEL.fullmatch(path) or _FILE.fullmatch(path)
        name, kind, rest = match.groups() if match else ("", None, None)
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.may_write()):
            return self.refuse(401 if repository else 404, "RepoNotFound")
        is_file = path.startswith(f"/{name}/")
        revision = (kind if is_file else rest) or "main"
        commit = repository.branches.get(revision, revision)
        if commit not in repository.commits:
            return self.refuse(404, "RevisionNotFound")
        files = repository.commits[commit]
        if is_file:
            if rest not in files:
                return self.refuse(404, "EntryNotFound")
            return self.answer(files[rest], ETag=f'"{_oid(files[rest])}"', X_Repo_Commit=commit)
        if kind == "tree":
            rows = [(path, len(data), _oid(data)) for path, data in files.items()]
            keys = ("path", "size", "oid")
            return self.answer([{"type": "file", **dict(zip(keys, r, strict=True))} for r in rows])
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": commit, "private": repository.private, "siblings": siblings}
        return self.answer(about)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if path == "/api/validate-yaml":
            faults = [{"message": "no such license"}] if b"license: wrong" in body else []
            return self.answer({"errors": faults, "warnings": []}, 400 if faults else 200)
        if not self.may_write():
            return self.refuse(401, "Unauthorized")
        repositories = self.server.repositories
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}"
            status = 409 if name in repositories else 200
            private = bool(asked.get("private", self.server.private_by_default))
            private = asked.get("visibility", "private" if private else "public") == "private"
            repositories.setdefault(name, Repository(private))
            return self.answer({"url": f"{self.server.url}/{name}", "id": name}, status)
        match = _MODEL.fullmatch(path)
        assert match is not None, path
        name, kind, branch = match.groups()
        repository = repositories[name]
        if kind == "branch":
            status = 409 if branch in repository.branches else 200
            repository.branches.setdefault(branch, repository.branches["main"])
            return self.answer({}, status)
        if branch not in repository.branches:
            return self.refuse(404, "RevisionNotFound")
        if kind == "preupload":
            files = json.loads(body)["files"]
            modes = {"uploadMode": "regular", "shouldIgnore": False}
            return self.answer({"files": [{"path": file["path"], **modes} for file in files]})
        assert kind == "commit", path
        lines = [json.loads(line) for line in body.splitlines()]
        assert {line["key"] for line in lines} == {"header", "file"}  # nothing is deleted
        values = [line["value"] for line in lines[1:]]
        added = {value["path"]: base64.b64decode(value["content"]) for value in values}
        commit = repository.commit(branch, added, lines[0]["value"]["summary"])
        url = f"{self.server.url}/{name}/commit/{commit}"
        return self.answer({"commitUrl": url, "commitOid": commit})

    def may_write(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"


def _oid(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


@contextmanager
def running_hub() -> Iterator[Hub]:
    """The server in a thread."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
