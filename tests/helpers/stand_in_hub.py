"""A stand-in of the Hugging Face Hub: the part of its HTTP interface that downloads, and commits of models, use."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from huggingface_hub import constants

WRITER, READER = "hf_writer", "hf_reader"  # tokens; the second may not write


@dataclass
class Repository:
    """Commits by their names, each with all files of it, and the branches and tags that name them."""

    private: bool = False
    gated: bool = False
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def commit(self, files: dict[str, bytes], ref: str = "main") -> str:
        name = hashlib.sha1(f"{len(self.commits)} {sorted(files)}".encode()).hexdigest()
        self.commits[name] = files
        self.refs[ref] = name
        return name


class StandInHub:
    """Repositories by ORGANIZATION/NAME, the requests so far as "METHOD path", and files that were uploaded apart."""

    def __init__(self, endpoint: str) -> None:
        self.endpoint = endpoint
        self.repositories: dict[str, Repository] = {}
        self.requests: list[str] = []
        self.large: dict[str, bytes] = {}
        self.broken: int | None = None  # status of every answer

    def add(self, name: str, files: dict[str, bytes], **settings: bool) -> Repository:
        repository = self.repositories[name] = Repository(**settings)
        repository.commit(files)
        return repository

    def fetched(self) -> list[str]:
        """Paths of files that were downloaded, in order."""
        gets = [request.partition("/resolve/")[2] for request in self.requests if request.startswith("GET ")]
        return [path.partition("/")[2] for path in gets if path]


class _Refused(Exception):
    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status, self.headers = status, {"X-Error-Code": code, "X-Error-Message": message}


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: StandInHub

    def log_message(self, *args: Any) -> None:
        """Print nothing."""

    def _answer(self) -> None:
        body = self._body()
        path = unquote(urlsplit(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            if self.hub.broken is not None:
                raise _Refused(self.hub.broken, "", "broken")
            for pattern, name in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    getattr(self, name)(*match.groups(), body=body)
                    return
            raise _Refused(404, "", f"no such page: {path}")
        except _Refused as error:
            self._send(error.status, {"error": str(error)}, error.headers)

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def _send(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ------------------------------------------------------------------------------------------------------- reading

    def _token(self) -> str | None:
        return self.headers.get("Authorization", "").removeprefix("Bearer ") or None

    def _repository(self, name: str) -> Repository:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self._token() not in (WRITER, READER)):
            raise _Refused(404 if self._token() else 401, "RepoNotFound", "Repository not found")
        return found

    def _files(self, name: str, revision: str) -> tuple[Repository, str, dict[str, bytes]]:
        repository = self._repository(name)
        if repository.gated:
            raise _Refused(403, "GatedRepo", f"Access to model {name} is restricted")
        commit = repository.refs.get(revision, revision)
        if commit not in repository.commits:
            raise _Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repository, commit, repository.commits[commit]

    def info(self, name: str, revision: str | None, body: bytes) -> None:
        repository, commit, files = self._files(name, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self._send(
            200, {"id": name, "modelId": name, "sha": commit, "private": repository.private, "siblings": siblings}
        )

    def tree(self, name: str, revision: str, folder: str | None, body: bytes) -> None:
        _, _, files = self._files(name, revision)
        if folder is not None:
            files = {path: content for path, content in files.items() if path.startswith(f"{folder}/")}
            if not files:
                raise _Refused(404, "EntryNotFound", "Entry not found")
        entries: list[dict[str, Any]] = [
            {"type": "directory", "path": folder, "oid": "0" * 40}
            for folder in sorted({path.rpartition("/")[0] for path in files} - {""})
        ]
        entries += [_entry(path, content) for path, content in files.items()]
        self._send(200, entries)

    def resolve(self, name: str, revision: str, path: str, body: bytes) -> None:
        _, commit, files = self._files(name, revision)
        if path not in files:
            raise _Refused(404, "EntryNotFound", "Entry not found")
        digest = (hashlib.sha256 if _is_large(path) else hashlib.sha1)(files[path]).hexdigest()
        self._send(200, files[path], {"X-Repo-Commit": commit, "ETag": f'"{digest}"'})

    # ------------------------------------------------------------------------------------------------------- writing

    def _check_writer(self) -> None:
        if self._token() is None:
            raise _Refused(401, "", "Invalid username or password.")
        if self._token() != WRITER:
            raise _Refused(403, "", "You don't have the rights to create a model under this namespace")

    def create(self, body: bytes) -> None:
        self._check_writer()
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if name in self.hub.repositories:
            self._send(409, {"error": "You already created this model repo", "url": f"{self.hub.endpoint}/{name}"})
            return
        private = asked.get("private") is True or asked.get("visibility") == "private"
        self.hub.add(name, {".gitattributes": b"*.safetensors filter=lfs"}, private=private)
        self._send(200, {"url": f"{self.hub.endpoint}/{name}", "name": name, "id": name})

    def branch(self, name: str, branch: str, body: bytes) -> None:
        self._check_writer()
        repository = self._repository(name)
        if branch in repository.refs:
            raise _Refused(409, "", "Reference already exists")
        repository.refs[branch] = repository.refs["main"]
        self._send(201, {})

    def validate(self, body: bytes) -> None:
        text = json.loads(body)["content"]
        metadata = yaml.safe_load(text.split("---\n")[1])
        licenses = ("mit", "apache-2.0")
        known = metadata.get("license", "mit") in licenses
        wrong = [] if known else [{"message": f'"license" must be one of {licenses}'}]
        self._send(400 if wrong else 200, {"errors": wrong, "warnings": []})

    def preupload(self, name: str, revision: str, body: bytes) -> None:
        self._check_writer()
        self._files(name, revision)
        self._send(
            200,
            {
                "files": [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if _is_large(file["path"]) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(body)["files"]
                ]
            },
        )

    def batch(self, name: str, body: bytes) -> None:
        self._check_writer()
        objects = [
            {**wanted, "actions": {"upload": {"href": f"{self.hub.endpoint}/large/{wanted['oid']}"}}}
            for wanted in json.loads(body)["objects"]
        ]
        self._send(200, {"transfer": "basic", "objects": objects})

    def upload(self, digest: str, body: bytes) -> None:
        assert hashlib.sha256(body).hexdigest() == digest
        self.hub.large[digest] = body
        self._send(200, {})

    def commit(self, name: str, revision: str, body: bytes) -> None:
        self._check_writer()
        repository, _, there = self._files(name, revision)
        files = dict(there)
        for line in body.splitlines():
            key, value = (entry := json.loads(line))["key"], entry["value"]
            if key == "file":
                assert value["encoding"] == "base64"
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif key == "deletedFile":
                del files[value["path"]]
            else:
                assert key == "header"
        made = repository.commit(files, revision)
        address = f"{self.hub.endpoint}/{name}/commit/{made}"
        self._send(200, {"success": True, "commitOid": made, "commitUrl": address})


_NAME = r"([^/]+/[^/]+)"
_ROUTES = [
    (rf"GET /api/(?:models|datasets)/{_NAME}(?:/revision/(.+))?", "info"),
    (rf"GET /api/(?:models|datasets)/{_NAME}/tree/([^/]+)(?:/(.+))?", "tree"),
    (rf"(?:GET|HEAD) /(?:datasets/)?{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "validate"),
    (rf"POST /api/models/{_NAME}/branch/(.+)", "branch"),
    (rf"POST /api/models/{_NAME}/preupload/(.+)", "preupload"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /large/(.+)", "upload"),
    (rf"POST /api/models/{_NAME}/commit/(.+)", "commit"),
]


def _entry(path: str, content: bytes) -> dict[str, Any]:
    """Return a file as the hub lists it."""
    entry = {"type": "file", "path": path, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
    if _is_large(path):
        entry["lfs"] = {"oid": hashlib.sha256(content).hexdigest(), "size": len(content), "pointerSize": 134}
    return entry


def _is_large(path: str) -> bool:
    """Return whether a file is uploaded apart from the commit, as weights are."""
    return path.endswith((".safetensors", ".png"))


@contextmanager
def running_hub() -> Iterator[StandInHub]:
    """Serve a stand-in on a free port of this machine until the block ends."""
    handler = type("Handler", (_Handler,), {})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    handler.hub = hub = StandInHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def use_hub(patch: pytest.MonkeyPatch, endpoint: str, home: Path, *, token: str | None = WRITER) -> None:
    """Let huggingface_hub speak with an endpoint, and keep its cache in a folder; None: no token."""
    patch.setattr(constants, "ENDPOINT", endpoint)
    patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}")
    patch.setattr(constants, "HF_HUB_CACHE", str(home / "hub"))
    patch.setattr(constants, "AGENT_HARNESSES_PATH", str(home / "harnesses.json"), raising=False)
    patch.setattr(constants, "HF_TOKEN_PATH", str(home / "token"))
    patch.setattr(constants, "HF_HUB_OFFLINE", False)
    patch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # large files go over plain HTTP
    patch.delenv("HF_TOKEN", raising=False)
    if token is not None:
        patch.setenv("HF_TOKEN", token)
