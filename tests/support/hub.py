"""A hub of this machine: the routes of huggingface.co that a download and an upload use, over plain
HTTP, with a count of who asked for what.
"""

import base64
import hashlib
import json
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

COMMIT = hashlib.sha1(b"the first").hexdigest()
BRANCHES = {"main": COMMIT, "v2": hashlib.sha1(b"the second").hexdigest()}


class Hub:
    """`models`: repository -> directory of its files, the same at every revision."""

    def __init__(self, models: dict[str, Path], gated=(), broken_uploads=False):
        self.models, self.gated, self.broken_uploads = models, set(gated), broken_uploads
        # (method, file) -> requests; bytes of a file that left
        self.asked, self.sent, self.created = Counter(), Counter(), []
        self.uploaded: dict[str, bytes] = {}
        self.url = ""

    def fetched(self, suffix: str) -> set[str]:
        """Names of the files, each with its repository, whose whole content left."""
        return {
            name
            for name, size in self.sent.items()
            if name.endswith(suffix) and size >= self._path(name).stat().st_size
        }

    def _path(self, name: str) -> Path:
        repo, _, file = name.partition(":")
        return self.models[repo] / file


@contextmanager
def a_hub(models: dict[str, Path], **options) -> Iterator[Hub]:
    hub = Hub(models, **options)
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *args) -> None:
        pass

    def do_HEAD(self) -> None:
        self._read()

    def do_GET(self) -> None:
        self._read()

    def do_POST(self) -> None:
        """create, preupload and commit."""
        size = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(size) if size else self._chunks()
        path = unquote(urlsplit(self.path).path)
        if path.endswith("/repos/create"):
            self.hub.created.append(json.loads(body))
            self._json({"url": f"{self.hub.url}/org/name", "id": "org/name"})
        elif self.hub.broken_uploads:
            self._refuse(500, "")
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = [
                {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files
            ]
            self._json({"files": modes})
        elif "/commit/" in path:
            for row in map(json.loads, body.splitlines()):
                if row["key"] == "file":
                    content = base64.b64decode(row["value"]["content"])
                    self.hub.uploaded[row["value"]["path"]] = content
            self._json({"commitUrl": f"{self.hub.url}/c", "commitOid": COMMIT, "success": True})
        else:
            self._refuse(404, "")

    def _chunks(self) -> bytes:
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _read(self) -> None:
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "whoami-v2"]:
            if self.headers.get("Authorization") == "Bearer hf_good":
                return self._json({"name": "org", "type": "user", "orgs": []})
            return self._refuse(401, "")
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if parts[2:3] != ["resolve"]:  # what the library asks beside a model
            return self._refuse(404, "")
        repo, (_, revision, *file) = "/".join(parts[:2]), parts[2:]
        return self._file(repo, revision, "/".join(file))

    def _api(self, repo: str, rest: list[str]) -> None:
        if repo not in self.hub.models:
            return self._refuse(404, "RepoNotFound")
        commit = BRANCHES.get(rest[1], rest[1]) if len(rest) > 1 else COMMIT
        if commit not in BRANCHES.values():
            return self._refuse(404, "RevisionNotFound")
        if rest[0] == "revision":
            return self._json({"id": repo, "sha": commit, "siblings": [], "private": False})
        files = sorted(p for p in self.hub.models[repo].iterdir() if p.is_file())
        rows = [
            {"type": "file", "path": p.name, "size": p.stat().st_size, "oid": _etag(p)}
            for p in files
        ]
        return self._json(rows)

    def _file(self, repo: str, revision: str, file: str) -> None:
        if repo not in self.hub.models:
            return self._refuse(404, "RepoNotFound")
        if repo in self.hub.gated:
            return self._refuse(403, "GatedRepo")
        path = self.hub.models[repo] / file
        if not path.is_file():
            return self._refuse(404, "EntryNotFound")
        content, status = path.read_bytes(), 200
        self.hub.asked[self.command, f"{repo}:{file}"] += 1
        headers = {
            "ETag": f'"{_etag(path)}"',
            "X-Repo-Commit": BRANCHES.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        if wanted := self.headers.get("Range"):
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            last = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[int(first) : last + 1], 206
        if self.command == "GET":
            self.hub.sent[f"{repo}:{file}"] += len(content)
        self._answer(status, content, headers)

    def _json(self, value) -> None:
        self._answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str) -> None:
        self._answer(status, b"{}", {"X-Error-Code": code} if code else {})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()
