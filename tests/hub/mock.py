"""A local server that answers as the Hugging Face hub does, and fails as it is told to.

Only what huggingface_hub asks of it for models: look up, create, preupload, LFS batch, parts, commit, download.
"""

from __future__ import annotations

import base64
import hashlib
import http.server
import json
import re
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN, READ_ONLY = "hf_write", "hf_read"
PART = 400_000  # bytes of a part, where an upload has several
LFS = (".gguf", ".npz", ".imatrix", ".safetensors")


def blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@dataclass
class Fault:
    """What happens to the next `times` requests that fit: a status, or a connection dropped before or after the work,
    or in the middle of the body."""

    request: str  # a regular expression on 'METHOD path'
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    drop: str = ""  # before, after, middle
    times: int = 1


@dataclass
class Repo:
    private: bool = False
    gated: bool = False
    files: dict[str, bytes] = field(default_factory=dict)
    history: list[dict[str, bytes]] = field(default_factory=list)

    @property
    def commit(self) -> str:
        return self._name(len(self.history), self.files)

    def at(self, revision: str | None) -> dict[str, bytes] | None:
        """Its files at a branch, a tag or a commit of any time."""
        if revision in (None, "main", "v1"):
            return self.files
        every = enumerate([*self.history, self.files])
        return next((files for number, files in every if self._name(number, files) == revision), None)

    @staticmethod
    def _name(number: int, files: dict[str, bytes]) -> str:
        return hashlib.sha1(repr((number, sorted(files.items()))).encode()).hexdigest()


class MockHub:
    """The state of the server, for tests to prepare and to look at."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.stored: dict[str, bytes] = {}  # LFS objects by sha256
        self.parts: dict[tuple[str, int], bytes] = {}
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.before_commit: list[Any] = []  # called once each, to write in between
        self.corrupt: dict[str, int] = {}  # downloads of this file that bring other bytes
        self.ignored: set[str] = set()
        self.lock = threading.Lock()
        self.url = ""

    def count(self, pattern: str) -> int:
        return sum(re.search(pattern, line) is not None for line in self.log)

    def fault(self, line: str) -> Fault | None:
        for one in self.faults:
            if one.times > 0 and re.search(one.request, line):
                one.times -= 1
                return one
        return None


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = 1 << 16  # an answer in one piece
    hub: MockHub

    def _any(self) -> None:
        parts = urlsplit(self.path)
        self.query = parse_qs(parts.query)
        path = unquote(parts.path)
        line = f"{self.command} {path}" + (f"?part={self.query['part'][0]}" if "part" in self.query else "")
        with self.hub.lock:
            self.hub.log.append(line)
            fault = self.hub.fault(line)
        if fault and fault.drop == "before":
            self._drop()
            return
        body = self._body()
        if fault and fault.status:
            # an error before the work: nothing of it happened
            self._json({"error": f"made up {fault.status}"}, fault.status, fault.headers)
            return
        self.fail = fault.drop if fault else ""
        for pattern, name in ROUTES:
            if found := re.fullmatch(pattern, line.partition("?")[0]):
                getattr(self, name)(body, *found.groups())
                return
        self._json({"error": "no such page"}, 404)

    do_GET = do_HEAD = do_PUT = do_POST = _any

    def _drop(self) -> None:
        self.close_connection = True
        self.connection.shutdown(socket.SHUT_RDWR)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            made = b""
            while size := int(self.rfile.readline().strip(), 16):
                made += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
            return made
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, body: bytes, status: int, headers: dict[str, str]) -> None:
        if self.fail == "after":
            self._drop()
            return
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.fail == "middle":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self._drop()
        else:
            self.wfile.write(body)

    fail = ""

    def _json(self, document: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(document).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def _token(self) -> str:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def _repo(self, name: str) -> Repo | None:
        """The repository if this token may see it; else the answer is given here."""
        repo = self.hub.repos.get(name)
        if repo is None or (repo.private and not self._token()):
            error = {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository not found"}
            self._json({"error": "Repository not found"}, 404 if self._token() else 401, error)
            return None
        return repo

    def _may_write(self) -> bool:
        if self._token() == TOKEN:
            return True
        if self._token():
            self._json({"error": "no right"}, 403, {"X-Error-Message": "You don't have the rights to write"})
        else:
            self._json({"error": "Unauthorized"}, 401, {"X-Error-Message": "Unauthorized"})
        return False

    # --- looking up, creating ---

    def info(self, _: bytes, name: str, revision: str | None) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (files := repo.at(revision)) is None:
            error = {"X-Error-Code": "RevisionNotFound", "X-Error-Message": f"Invalid rev id: {revision}"}
            self._json({"error": "no such revision"}, 404, error)
            return
        siblings = []
        for path, data in sorted(files.items()):
            sibling: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": blob(data)}
            if path.endswith(LFS):
                sibling["blobId"] = blob(b"pointer" + data)
                digest = hashlib.sha256(data).hexdigest()
                sibling["lfs"] = {"sha256": digest, "size": len(data), "pointerSize": 134}
            siblings.append(sibling)
        sha = repo.commit if files is repo.files else revision
        info = {"_id": "1", "id": name, "sha": sha, "private": repo.private, "tags": [], "siblings": siblings}
        self._json(info)

    def create(self, body: bytes) -> None:
        if not self._may_write():
            return
        wanted = json.loads(body)
        name = f"{wanted['organization']}/{wanted['name']}"
        status = 409 if name in self.hub.repos else 200
        private = wanted.get("private") or wanted.get("visibility") == "private"
        self.hub.repos.setdefault(name, Repo(private=bool(private), files={".gitattributes": b"*.gguf filter=lfs"}))
        self._json({"url": f"{self.hub.url}/{name}", "error": "exists"}, status)

    def card(self, _: bytes) -> None:
        self._json({"warnings": [], "errors": []})

    # --- uploading ---

    def preupload(self, body: bytes, name: str) -> None:
        if not self._may_write() or (repo := self._repo(name)) is None:
            return
        answers = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular",
                "shouldIgnore": file["path"] in self.hub.ignored,
                "oid": blob(repo.files[file["path"]]) if file["path"] in repo.files else None,
            }
            for file in json.loads(body)["files"]
        ]
        self._json({"files": answers, "commitOid": repo.commit})

    def batch(self, body: bytes, name: str) -> None:
        if not self._may_write():
            return
        objects = []
        for one in json.loads(body)["objects"]:
            oid, size = one["oid"], one["size"]
            answer: dict[str, Any] = {"oid": oid, "size": size}
            if oid not in self.hub.stored:
                upload: dict[str, Any] = {"href": f"{self.hub.url}/lfs/{oid}"}
                if size > PART:
                    count = -(-size // PART)
                    header = {str(i + 1): f"{self.hub.url}/lfs/{oid}?part={i + 1}" for i in range(count)}
                    upload = {"href": f"{self.hub.url}/complete/{oid}", "header": {"chunk_size": str(PART), **header}}
                answer["actions"] = {"upload": upload, "verify": {"href": f"{self.hub.url}/verify/{oid}"}}
            objects.append(answer)
        self._json({"objects": objects, "transfer": "multipart"})

    def put(self, body: bytes, oid: str) -> None:
        if "part" in self.query:
            self.hub.parts[oid, int(self.query["part"][0])] = body
        else:
            assert hashlib.sha256(body).hexdigest() == oid
            self.hub.stored[oid] = body
        self._send(b"", 200, {"ETag": '"part"'})

    def complete(self, body: bytes, oid: str) -> None:
        numbers = [part["partNumber"] for part in json.loads(body)["parts"]]
        data = b"".join(self.hub.parts[oid, number] for number in numbers)
        assert hashlib.sha256(data).hexdigest() == oid
        self.hub.stored[oid] = data
        self._json({})

    def verify(self, body: bytes, oid: str) -> None:
        self._json({}, 200 if len(self.hub.stored[oid]) == json.loads(body)["size"] else 400)

    def commit(self, body: bytes, name: str) -> None:
        if not self._may_write() or (repo := self._repo(name)) is None:
            return
        if self.hub.before_commit:
            self.hub.before_commit.pop(0)(repo)
        lines = [json.loads(line) for line in body.splitlines()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit") not in (None, repo.commit):
            self._json({"error": "A commit has happened since"}, 412)
            return
        repo.history.append(dict(repo.files))
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                repo.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repo.files[value["path"]] = self.hub.stored[value["oid"]]
        url = f"{self.hub.url}/{name}/commit/{repo.commit}"
        self._json({"success": True, "commitOid": repo.commit, "commitUrl": url})

    # --- downloading ---

    def resolve(self, _: bytes, name: str, revision: str, path: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if repo.gated and self._token() != TOKEN:
            error = {"X-Error-Code": "GatedRepo", "X-Error-Message": f"Access to model {name} is restricted"}
            self._json({"error": "gated"}, 403 if self._token() else 401, error)
            return
        files = repo.at(revision) or {}
        commit = repo.commit if files is repo.files else revision
        if path not in files:
            self._json({"error": "none"}, 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            return
        data = files[path]
        digest = hashlib.sha256(data).hexdigest() if path.endswith(LFS) else blob(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"', "Accept-Ranges": "bytes"}
        if self.command == "GET" and self.hub.corrupt.get(path, 0) > 0:
            self.hub.corrupt[path] -= 1
            data = bytes(len(data))
        status = 200
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            start = int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            self.hub.log.append(f"RANGE {path} from {start}")
            data, status = data[start:], 206
        self._send(data, status, headers)

    def log_message(self, format: str, *args: Any) -> None:
        pass


_NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    (rf"GET /api/models/{_NAME}(?:/revision/(.+))?", "info"),
    (r"POST /api/repos/create", "create"),
    (r"POST /api/validate-yaml", "card"),
    (rf"POST /api/models/{_NAME}/preupload/main", "preupload"),
    (rf"POST /{_NAME}\.git/info/lfs/objects/batch", "batch"),
    (r"PUT /lfs/(\w+)", "put"),
    (r"POST /complete/(\w+)", "complete"),
    (r"POST /verify/(\w+)", "verify"),
    (rf"POST /api/models/{_NAME}/commit/main", "commit"),
    (rf"(?:GET|HEAD) /{_NAME}/resolve/([^/]+)/(.+)", "resolve"),
]


@contextmanager
def serving() -> Iterator[MockHub]:
    """A MockHub behind a server of its own, at `.url`."""
    hub = MockHub()
    handler = type("Bound", (Handler,), {"hub": hub})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        server.block_on_close = False
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()
