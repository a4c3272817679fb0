"""A Hub on this machine: the part of its API that the real client uses to push, pull and load, with faults on demand.

Repositories live in memory, as a list of commits for each branch. Large files go through LFS, as on the Hub: they are
stored by their hash first, and a commit only names them.
"""

import base64
import hashlib
import http.server
import json
import re
import socket
import struct
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".parquet", ".png", ".bin", ".pt", ".pth")
_TYPES = {"models": "model", "datasets": "dataset"}


@dataclass
class Blob:
    """A file of a commit."""

    content: bytes
    is_lfs: bool

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.content).hexdigest()

    @property
    def git_oid(self) -> str:
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()

    @property
    def oid(self) -> str:
        """What the client compares with its own file."""
        return self.sha256 if self.is_lfs else self.git_oid


@dataclass
class Commit:
    """The files after a commit, and the paths that it changed."""

    files: dict[str, Blob]
    changed: list[str]
    message: str = ""

    @property
    def oid(self) -> str:
        described = repr(sorted((path, blob.oid) for path, blob in self.files.items())) + self.message
        return hashlib.sha1(described.encode()).hexdigest()


@dataclass
class Repository:
    """A model or a data set."""

    private: bool
    branches: dict[str, list[Commit]] = field(default_factory=lambda: {"main": [Commit({}, [])]})

    def commit(self, revision: str) -> Commit | None:
        """The last one of a branch, or one by its id."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return next((one for branch in self.branches.values() for one in branch if one.oid == revision), None)

    @property
    def files(self) -> dict[str, bytes]:
        """What lies on the branch main."""
        return {path: blob.content for path, blob in self.branches["main"][-1].files.items()}

    @property
    def commits(self) -> list[Commit]:
        """Those of the branch main, without the empty one at the beginning."""
        return self.branches["main"][1:]


@dataclass
class Fault:
    """What happens to some requests instead of an answer."""

    method: str
    path: str
    """Regular expression."""
    nth: int = 1
    """The first matching request that fails."""
    times: int = 1
    how: int | str = 500
    """A status, "reset" (the connection breaks in the middle of the body) or "lost" (after the work was done)."""
    seen: int = 0
    struck: int = 0

    def strikes(self, method: str, path: str) -> bool:
        if method != self.method or not re.search(self.path, path):
            return False
        self.seen += 1
        strikes = self.nth <= self.seen < self.nth + self.times
        self.struck += strikes
        return strikes


class LoopbackHub(http.server.ThreadingHTTPServer):
    """The server.

    Attributes:
        users: token to name of the user.
        repositories: by type and id, such as `("model", "ada/clip")`.
        stored: LFS objects by sha256.
        faults: what goes wrong, each counted by itself.
        requests: method and path of each request, in the order of arrival.
        uploads: sha256 of each object that was really sent, in order.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Answers)
        self.users = {"hf_loopback_ada": "ada", "hf_loopback_bob": "bob"}
        self.repositories: dict[tuple[str, str], Repository] = {}
        self.stored: dict[str, bytes] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.uploads: list[str] = []
        self.lock = threading.Lock()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def storage(self) -> str:
        """Where large files come from: as at the Hub, a host of its own, for the client passes it no token."""
        return f"http://localhost:{self.server_port}"

    def model(self, repo_id: str) -> Repository:
        return self.repositories["model", repo_id]

    def dataset(self, repo_id: str) -> Repository:
        return self.repositories["dataset", repo_id]

    def add_file(self, repo_id: str, path: str, content: bytes | str, kind: str = "model") -> None:
        """Put a file into a public repository without the client."""
        content = content.encode() if isinstance(content, str) else content
        repository = self.repositories.setdefault((kind, repo_id), Repository(private=False))
        files = {**repository.branches["main"][-1].files, path: Blob(content, path.endswith(LFS_SUFFIXES))}
        repository.branches["main"].append(Commit(files, [path]))

    def handle_error(self, request, client_address):
        """Connections that break are part of the tests and no news."""


@contextmanager
def serving() -> Iterator[LoopbackHub]:
    """The server while it runs."""
    with LoopbackHub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        yield hub
        hub.shutdown()
        thread.join()


class _Refused(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class _Answers(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def do_GET(self):
        self._handle()

    do_HEAD = do_POST = do_PUT = do_GET

    def _handle(self):
        split = urlsplit(self.path)
        self.route, self.query = unquote(split.path), parse_qs(split.query)
        with self.server.lock:
            self.server.requests.append((self.command, self.route))
            fault = next((one for one in self.server.faults if one.strikes(self.command, self.route)), None)
        if fault is not None and fault.how == "reset":
            self.rfile.read(min(64, int(self.headers.get("Content-Length") or 0)))
            return self._reset()
        self.body = self._read_body()
        if fault is not None and fault.how != "lost":
            return self._json({"error": "a fault was asked for"}, fault.how)
        self.loses_answer = fault is not None
        try:
            with self.server.lock:
                self._dispatch()
        except _Refused as refusal:
            headers = {"X-Error-Message": str(refusal)} | ({"X-Error-Code": refusal.code} if refusal.code else {})
            self._json({"error": str(refusal)}, refusal.status, headers)

    def _dispatch(self):
        path = self.route
        if path == "/api/whoami-v2":
            return self._json({"type": "user", "name": self._user(needed=True), "orgs": []})
        if path == "/api/repos/create":
            return self._create(json.loads(self.body))
        if path == "/api/validate-yaml":
            return self._validate(json.loads(self.body))
        if match := re.fullmatch(r"/lfs/([0-9a-f]{64})", path):
            return self._put(match[1]) if self.command == "PUT" else self._content(self._object(match[1]), match[1])
        if path == "/lfs/verify":
            named = json.loads(self.body)
            found = self.server.stored.get(named["oid"])
            return self._json({}, 200 if found is not None and len(found) == named["size"] else 404)
        if match := re.fullmatch(r"/(datasets/)?(.+?/.+?)\.git/info/lfs/objects/batch", path):
            self._repository("dataset" if match[1] else "model", match[2], writes=True)
            return self._batch(json.loads(self.body))
        if match := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._resolve("dataset" if match[1] else "model", *match.groups()[1:])
        if match := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(?:/([a-z-]+)(?:/([^/]+)(?:/(.*))?)?)?", path):
            kind, repo_id, action, revision, rest = match.groups()
            return self._api(_TYPES[kind], repo_id, action, revision or "main", rest or "")
        raise _Refused(404, f"no such address: {path}")

    # ---- repositories ----

    def _api(self, kind: str, repo_id: str, action: str | None, revision: str, rest: str):
        repository = self._repository(kind, repo_id, writes=action in ("preupload", "commit", "branch"))
        if action == "branch":
            return self._branch(repository, revision)
        commit = repository.commit(revision)
        if commit is None:
            raise _Refused(404, f"no revision {revision}", "RevisionNotFound")
        if action in (None, "revision"):
            siblings = [{"rfilename": path} for path in commit.files]
            facts = {"id": repo_id, "sha": commit.oid, "private": repository.private, "tags": [], "downloads": 0}
            return self._json(facts | {"siblings": siblings, "gated": False, "disabled": False, "likes": 0})
        if action == "tree":
            return self._tree(commit, rest)
        if action == "paths-info":
            asked = json.loads(self.body)["paths"] if self.body.startswith(b"{") else parse_qs(self.body.decode())
            wanted = asked.get("paths", []) if isinstance(asked, dict) else asked
            return self._json([_entry(path, commit.files[path]) for path in wanted if path in commit.files])
        if action == "preupload":
            return self._preupload(commit, json.loads(self.body))
        if action == "commit":
            return self._commit(repository, repo_id, revision)
        raise _Refused(404, f"no such action: {action}")

    def _user(self, needed: bool = False) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.server.users:
            raise _Refused(401, "Invalid credentials in Authorization header")
        if needed and not token:
            raise _Refused(401, "Invalid username or password.")
        return self.server.users.get(token)

    def _repository(self, kind: str, repo_id: str, writes: bool = False) -> Repository:
        user, repository = self._user(), self.server.repositories.get((kind, repo_id))
        owns = user == repo_id.split("/")[0]
        if repository is None or (repository.private and not owns):
            raise _Refused(404 if user else 401, "Repository not found", "RepoNotFound")
        if writes and not owns:
            raise _Refused(403, "you have no right to write here")
        return repository

    def _create(self, asked: dict):
        user = self._user(needed=True)
        repo_id, kind = f"{asked.get('organization') or user}/{asked['name']}", asked.get("type") or "model"
        if repo_id.split("/")[0] != user:
            raise _Refused(403, "you have no right to create a repository in this namespace")
        address = f"{self.server.address}/{'datasets/' if kind == 'dataset' else ''}{repo_id}"
        if (kind, repo_id) in self.server.repositories:
            return self._json({"error": "You already created this repo", "url": address}, 409)
        private = asked.get("visibility") == "private" or bool(asked.get("private"))
        self.server.repositories[kind, repo_id] = Repository(private)
        self._json({"url": address, "name": repo_id})

    def _branch(self, repository: Repository, name: str):
        if name in repository.branches:
            raise _Refused(409, "reference already exists")
        repository.branches[name] = list(repository.branches["main"])
        self._json({})

    def _validate(self, asked: dict):
        match = re.match(r"---\n(.*?)\n---\n", asked["content"], flags=re.DOTALL)
        try:
            metadata = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError as error:
            return self._json({"errors": [{"message": str(error)}], "warnings": []}, 400)
        missing = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        self._json({"errors": [], "warnings": missing})

    def _tree(self, commit: Commit, below: str):
        files = {path: blob for path, blob in commit.files.items() if not below or path.startswith(f"{below}/")}
        if below and not files:
            raise _Refused(404, f"no folder {below}", "EntryNotFound")
        start = len(below) + 1 if below else 0
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("1", "true")
        folders = sorted({path[:end] for path in files for end in _slashes(path, start)})
        if not recursive:
            folders = [folder for folder in folders if "/" not in folder[start:]]
            files = {path: blob for path, blob in files.items() if "/" not in path[start:]}
        entries = [{"type": "directory", "path": folder, "oid": "0" * 40, "size": 0} for folder in folders]
        self._json(entries + [_entry(path, blob) for path, blob in sorted(files.items())])

    # ---- uploading ----

    def _preupload(self, commit: Commit, asked: dict):
        answer = []
        for file in asked["files"]:
            path = file["path"]
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            known = {"oid": commit.files[path].oid} if path in commit.files else {}
            answer.append({"path": path, "uploadMode": mode, "shouldIgnore": False, **known})
        self._json({"files": answer})

    def _batch(self, asked: dict):
        objects = []
        for wanted in asked["objects"]:
            named = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.server.stored:
                upload = {"href": f"{self.server.address}/lfs/{wanted['oid']}"}
                named["actions"] = {"upload": upload, "verify": {"href": f"{self.server.address}/lfs/verify"}}
            objects.append(named)
        self._json({"transfer": "basic", "objects": objects})

    def _put(self, oid: str):
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise _Refused(400, "the content is not what its hash says")
        self.server.stored[oid] = self.body
        self.server.uploads.append(oid)
        self._json({})

    def _object(self, oid: str) -> bytes:
        if oid not in self.server.stored:
            raise _Refused(404, "no such object")
        return self.server.stored[oid]

    def _commit(self, repository: Repository, repo_id: str, branch: str):
        files, changed, message = dict(repository.commit(branch).files), [], ""
        for line in self.body.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header":
                message = value["summary"]
                continue
            changed.append(value["path"])
            if operation["key"] == "file":
                files[value["path"]] = Blob(base64.b64decode(value["content"]), is_lfs=False)
            elif operation["key"] == "lfsFile":
                if value["oid"] not in self.server.stored:
                    raise _Refused(400, f"{value['path']} was not uploaded")
                files[value["path"]] = Blob(self.server.stored[value["oid"]], is_lfs=True)
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Refused(400, f"unknown operation {operation['key']}")
        commit = Commit(files, changed, message)
        repository.branches[branch].append(commit)
        url = f"{self.server.address}/{repo_id}/commit/{commit.oid}"
        self._json({"success": True, "commitOid": commit.oid, "commitUrl": url, "hookOutput": ""})

    # ---- downloading ----

    def _resolve(self, kind: str, repo_id: str, revision: str, path: str):
        commit = self._repository(kind, repo_id).commit(revision)
        if commit is None:
            raise _Refused(404, f"no revision {revision}", "RevisionNotFound")
        if path not in commit.files:
            raise _Refused(404, f"no file {path}", "EntryNotFound")
        blob = commit.files[path]
        headers = {"X-Repo-Commit": commit.oid}
        if blob.is_lfs:
            self.server.stored.setdefault(blob.sha256, blob.content)
            headers |= {"X-Linked-Etag": f'"{blob.sha256}"', "X-Linked-Size": str(len(blob.content))}
            headers["Location"] = f"{self.server.storage}/lfs/{blob.sha256}"
            return self._send(302, b"", headers)
        self._content(blob.content, blob.git_oid, headers)

    def _content(self, content: bytes, etag: str, headers: dict[str, str] | None = None):
        status, headers = 200, {"ETag": f'"{etag}"', "Accept-Ranges": "bytes", **(headers or {})}
        if match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        self._send(status, content, headers, "application/octet-stream")

    # ---- the wire ----

    def _read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _json(self, value, status: int = 200, headers: dict[str, str] | None = None):
        self._send(status, json.dumps(value).encode(), headers or {}, "application/json")

    def _send(self, status: int, content: bytes, headers: dict[str, str], kind: str = "text/plain"):
        if getattr(self, "loses_answer", False):
            return self._reset()
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(content)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _reset(self):
        # Without waiting for what is still on its way: the other side sees a reset.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        self.connection.close()


def _entry(path: str, blob: Blob) -> dict:
    entry = {"type": "file", "path": path, "oid": blob.git_oid, "size": len(blob.content)}
    if blob.is_lfs:
        entry["lfs"] = {"oid": blob.sha256, "size": len(blob.content), "pointerSize": 134}
    return entry


def _slashes(path: str, start: int) -> list[int]:
    return [place for place in range(start, len(path)) if path[place] == "/"]
