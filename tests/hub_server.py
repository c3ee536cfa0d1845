"""A stand-in for the Hugging Face hub on loopback: one repository, honest or broken on demand."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "acme/tiny"
COMMIT = "c0ffee" + "0" * 34
_LFS_FROM_BYTES = 100_000


@dataclass
class Hub:
    """What the server serves, how it misbehaves, and what it was asked."""

    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=lambda: {"main": COMMIT, "v1": COMMIT})
    cut_after: dict[str, list[int]] = field(default_factory=dict)
    """File -> after how many bytes to close each connection in turn."""
    served: dict[str, bytes] = field(default_factory=dict)
    """File -> bytes that are sent instead of the ones described."""
    names: list[str] = field(default_factory=list)
    """More names for the listing."""
    sizes: dict[str, int] = field(default_factory=dict)
    """File -> size that the listing gives instead of the real one."""
    token: str | None = None
    silent_s: float = 0.0
    ignore_range: bool = False
    url: str = ""
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    """Path and Range header of every file request."""

    def listing(self, commit: str) -> dict[str, Any]:
        siblings = [self._sibling(name) for name in self.files]
        siblings += [
            {"rfilename": name, "size": 3, "blobId": "1" * 40, "lfs": None} for name in self.names
        ]
        return {"id": REPO, "modelId": REPO, "sha": commit, "siblings": siblings, "tags": []}

    def _sibling(self, name: str) -> dict[str, Any]:
        data = self.files[name]
        size = self.sizes.get(name, len(data))
        entry: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_blob(data)}
        if len(data) >= _LFS_FROM_BYTES:
            sha256 = hashlib.sha256(data).hexdigest()
            entry["blobId"] = git_blob(sha256.encode())
            entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        return entry


def git_blob(data: bytes) -> str:
    """The name that git gives to a file of these bytes."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        threading.Event().wait(self.hub.silent_s)
        if self.hub.token and self.headers.get("Authorization") != f"Bearer {self.hub.token}":
            self._fail(401 if "Authorization" not in self.headers else 403, "GatedRepo")
        elif path.startswith(f"/api/models/{REPO}/revision/"):
            self._list(path.rpartition("/revision/")[2])
        elif path.startswith(f"/{REPO}/resolve/"):
            commit, _, name = path.removeprefix(f"/{REPO}/resolve/").partition("/")
            self._send_file(commit, name)
        else:
            self._fail(404, "RepoNotFound")

    def _fail(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _list(self, revision: str) -> None:
        commit = self.hub.branches.get(revision, revision)
        if commit not in self.hub.branches.values():
            return self._fail(404, "RevisionNotFound")
        body = json.dumps(self.hub.listing(commit)).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _send_file(self, commit: str, name: str) -> None:
        wanted = self.headers.get("Range")
        self.hub.asked.append((name, wanted))
        if commit not in self.hub.branches.values() or name not in self.hub.files:
            return self._fail(404, "EntryNotFound")
        data = self.hub.served.get(name, self.hub.files[name])
        start = 0
        if wanted and not self.hub.ignore_range:
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        else:
            self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{git_blob(self.hub.files[name])}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if self.command == "HEAD":
            return
        cuts = self.hub.cut_after.get(name)
        if cuts:
            self.wfile.write(data[start : start + cuts.pop(0)])
            self.wfile.flush()
            self.close_connection = True
            return
        self.wfile.write(data[start:])


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client that hangs up is part of the tests."""


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the stand-in until the block ends; its address is ``hub.url``."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
