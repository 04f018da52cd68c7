"""A Hub on localhost: the routes that huggingface_hub 2.4 calls, files with ranges, and faults on demand.

Large files (``LFS_BYTES`` and more) are answered with a redirect to another port, the Hub's CDN. ``Hub.requests`` holds
every request with its headers; ``Hub.faults`` what goes wrong next, by file name, or by
the repository's for questions about it. Run as a program it serves one
folder as ``user/model`` and prints its address.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import MappingProxyType
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlsplit

from tests.hub_contents import LFS_BYTES, OTHER_TOKEN, TOKEN, Content, Fault, Repo, bytes_of, size_of

__all__ = ["OTHER_TOKEN", "TOKEN", "Content", "Fault", "Hub", "Repo", "bytes_of", "folder_files", "served"]

_FILE_STEP = 1_000_000  # bytes of a file handed to the system at a time


@dataclass
class Request:
    """One request as it came. ``sent``: bytes of a file handed to the network, counted as they are handed over."""

    method: str
    path: str
    headers: dict[str, str]
    cdn: bool
    sent: int = 0


@dataclass(repr=False)
class Hub:
    """See the module. Use as a context manager."""

    repos: dict[str, Repo] = field(default_factory=dict)
    moved: dict[str, str] = field(default_factory=dict)  # old name → new name
    faults: dict[str, list[Fault]] = field(default_factory=dict)
    bytes_per_second: float = 0.0  # for all files together; 0 = as fast as it goes
    requests: list[Request] = field(default_factory=list)
    renames: dict[str, str] = field(default_factory=dict)  # file name → the name that the list gives instead
    answer_delay_s: float = 0.0

    def __enter__(self) -> Hub:
        self.ending = threading.Event()
        self._lock = threading.Lock()
        self._allowance, self._since = 0.0, time.monotonic()
        self._servers = [_serve(self, cdn=False), _serve(self, cdn=True)]
        self.url, self.cdn_url = (f"http://127.0.0.1:{server.server_address[1]}" for server in self._servers)
        return self

    def __exit__(self, *_: object) -> None:
        self.ending.set()
        for server in self._servers:
            server.shutdown()
            server.server_close()

    def asked(self, part: str = "", *, cdn: bool | None = None) -> list[Request]:
        """The requests whose path holds ``part``, to the Hub or to its CDN."""
        return [r for r in self.requests if part in r.path and cdn in (None, r.cdn)]

    def sent_bytes(self, file: str = "") -> int:
        """The bytes of files sent so far."""
        return sum(request.sent for request in self.requests if request.path.split("?")[0].endswith(file))

    def pace(self, count: int) -> None:
        """Wait until ``count`` more bytes may be sent."""
        if not self.bytes_per_second:
            return
        with self._lock:
            now = time.monotonic()
            self._since = max(self._since, now) + count / self.bytes_per_second
            wait = self._since - now
        self.ending.wait(wait)

    def next_fault(self, name: str) -> Fault:
        with self._lock:
            queued = self.faults.get(name, [])
            return queued.pop(0) if queued else Fault()


def _serve(hub: Hub, *, cdn: bool) -> ThreadingHTTPServer:
    class Server(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 64

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that goes away is what many tests are about

    handler = type("Handler", (_Handler,), {"hub": hub, "cdn": cdn})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    return server


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    cdn: bool
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, format: str, *arguments: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer_request()

    def do_GET(self) -> None:
        self._answer_request()

    def _answer_request(self) -> None:
        self.record = Request(self.command, self.path, {k.lower(): v for k, v in self.headers.items()}, self.cdn)
        self.hub.requests.append(self.record)
        if self.hub.answer_delay_s:
            self.hub.ending.wait(self.hub.answer_delay_s)
        path = unquote(urlsplit(self.path).path)
        if self.cdn:
            self._cdn(path)
        elif path == "/api/whoami-v2":
            self._whoami()
        elif path == "/api/models":
            self._search()
        elif path.startswith("/api/models/"):
            self._model(path.removeprefix("/api/models/"))
        elif "/resolve/" in path:
            self._resolve(path.strip("/"))
        else:
            self._error(404)

    # --- answers ---

    @property
    def token(self) -> str:
        return self.record.headers.get("authorization", "").removeprefix("Bearer ")

    def _json(self, data: Any, status: int = 200, **headers: str) -> None:
        body = json.dumps(data).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status: int, code: str = "", message: str = "", **headers: str) -> None:
        more = {"X-Error-Code": code} if code else {}
        more |= {"X-Error-Message": message} if message else {}
        self._json({"error": message or code or str(status)}, status, **more, **headers)

    def _redirect(self, to: str, status: int, headers: Mapping[str, str] = MappingProxyType({})) -> None:
        self.send_response(status)
        for name, value in {"Location": to, "Content-Length": "0", **headers}.items():
            self.send_header(name, value)
        self.end_headers()

    def _whoami(self) -> None:
        if self.token in (TOKEN, OTHER_TOKEN):
            names = {TOKEN: "tester", OTHER_TOKEN: "stranger"}
            access = {"displayName": "for tests", "role": "read"}
            self._json({"name": names[self.token], "auth": {"accessToken": access}})
        else:
            self._error(401, message="Invalid credentials in Authorization header")

    def _repo(self, name: str) -> Repo | None:
        """The repository that may be seen; otherwise the refusal has been sent."""
        repo = self.hub.repos.get(name)
        if self.token and self.token not in (TOKEN, OTHER_TOKEN):
            self._error(401, message="Invalid credentials in Authorization header")
            return None
        if repo is None or (repo.readers is not None and self.token not in repo.readers):
            if self.token:
                self._error(404, "RepoNotFound", "Repository not found")
            else:
                self._error(401, message="Invalid username or password.")
            return None
        if self.token in repo.forbidden:
            self._error(403, message="Token has insufficient permissions")
            return None
        return repo

    def _may_read(self, repo: Repo) -> bool:
        if not repo.gated or self.token in repo.accepted:
            return True
        self._error(403 if self.token else 401, "GatedRepo", "Access to this model is restricted.")
        return False

    def _search(self) -> None:
        query = {key: values[0] for key, values in parse_qs(urlsplit(self.path).query).items()}
        found = []
        for name, repo in self.hub.repos.items():
            words = query.get("search", "").lower()
            task = query.get("pipeline_tag", "")
            if words in name.lower() and task in ("", repo.info.get("pipeline_tag", "text-generation")):
                found.append({"_id": name, "id": name, "downloads": 1, "likes": 0, "gated": False, **repo.info})
        found.sort(key=lambda info: -info.get(query.get("sort", "downloads"), 0))
        self._json(found[: int(query.get("limit", 100))])

    def _model(self, rest: str) -> None:
        parts = rest.split("/")
        name, view = "/".join(parts[:2]), parts[2:]
        if name in self.hub.moved:
            query = urlsplit(self.path).query
            path = "/".join([self.hub.moved[name], *(quote(part, safe="") for part in view)])
            self._redirect(f"/api/models/{path}{'?' + query if query else ''}", 307)
            return
        if fault := self.hub.next_fault(name.rpartition("/")[2]).status:
            self._error(fault, **{"Retry-After": "0"})
            return
        if (repo := self._repo(name)) is None:
            return
        if view == ["auth-check"]:
            if self._may_read(repo):
                self._json({})
            return
        revision = "/".join(view[1:]) if view[:1] in (["revision"], ["tree"]) else "main"
        if (files := repo.at(revision)) is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif view[:1] == ["tree"]:
            self._json([self._tree_entry(repo, item, content) for item, content in files.items()])
        else:
            branch = next((b for b in repo.branches if repo.branches[b] is files), "main")
            siblings = [self._sibling(repo, item, content) for item, content in files.items()]
            gated = "auto" if repo.gated else False
            self._json({"_id": name, "id": name, "sha": repo.commit(branch), "siblings": siblings, "gated": gated,
                        "private": repo.readers is not None, "downloads": 1, "tags": [],
                        "pipeline_tag": "text-generation", **repo.info})  # fmt: skip

    def _sibling(self, repo: Repo, name: str, content: Content) -> dict[str, Any]:
        size, (sha256, blob) = size_of(content), repo.hashes(content)
        entry: dict[str, Any] = {"rfilename": self.hub.renames.get(name, name), "size": size, "blobId": blob}
        if size >= LFS_BYTES:
            entry["lfs"] = {"sha256": sha256, "size": size, "pointerSize": 134}
        return entry

    def _tree_entry(self, repo: Repo, name: str, content: Content) -> dict[str, Any]:
        size, (sha256, blob) = size_of(content), repo.hashes(content)
        entry: dict[str, Any] = {"type": "file", "path": name, "size": size, "oid": blob}
        if size >= LFS_BYTES:
            entry["lfs"] = {"oid": sha256, "size": size, "pointerSize": 134}
        return entry

    # --- files ---

    def _resolve(self, path: str) -> None:
        name, _, rest = path.partition("/resolve/")
        if name in self.hub.moved:
            self._redirect(f"/{self.hub.moved[name]}/resolve/{rest}", 307)
            return
        if (repo := self._repo(name)) is None or not self._may_read(repo):
            return
        revision, _, file = rest.partition("/")
        files = repo.at(revision)
        if files is None:
            self._error(404, "RevisionNotFound", "Invalid rev id")
        elif file not in files:
            self._error(404, "EntryNotFound", "Entry not found", **{"X-Repo-Commit": repo.commit("main")})
        else:
            self._file(repo, name, revision, file, files[file])

    def _file(self, repo: Repo, name: str, revision: str, file: str, content: Content) -> None:
        branch = next(b for b in repo.branches if repo.branches[b].get(file) is content)
        sha256, blob = repo.hashes(content)
        commit = {"X-Repo-Commit": repo.commit(branch)}
        if size_of(content) >= LFS_BYTES:
            linked = {"X-Linked-Etag": f'"{sha256}"', "X-Linked-Size": str(size_of(content)), **commit}
            signed = f"{self.hub.cdn_url}/{name}/{sha256}/{quote(file)}?signature=of-the-hub"
            self._redirect(signed, 302, linked)
        else:
            self._send(file, content, {"ETag": f'"{blob}"', **commit})

    def _cdn(self, path: str) -> None:
        _, owner, model, sha256, file = path.split("/", 4)
        repo = self.hub.repos[f"{owner}/{model}"]
        for files in repo.branches.values():
            for content in files.values():
                if size_of(content) >= LFS_BYTES and repo.hashes(content)[0] == sha256:
                    self._send(file, content, {"ETag": f'"{sha256}"'})
                    return
        self._error(404)

    def _send(self, file: str, content: Content, headers: Mapping[str, str]) -> None:
        fault = self.hub.next_fault(file) if self.command == "GET" else Fault()
        if fault.status:
            waits = {"Retry-After": str(fault.retry_after)} if fault.retry_after >= 0 else {}
            self._error(fault.status, **waits)
            return
        if fault.redirect:
            self._redirect(fault.redirect, 302)
            return
        size = size_of(content) - fault.short + fault.longer
        wanted = "" if fault.whole else self.record.headers.get("range", "")
        start, end = _range(wanted, size)
        if start >= size > 0:
            self._error(416, **{"Content-Range": f"bytes */{size}"})
            return
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{end - 1}/{size}")
        for name, value in {**headers, "Content-Length": str(end - start), "Accept-Ranges": "bytes",
                            "Last-Modified": formatdate(usegmt=True)}.items():  # fmt: skip
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self._bytes(content, start, end, fault)

    def _bytes(self, content: Content, start: int, end: int, fault: Fault) -> None:
        """``start`` up to ``end`` of the content, so far as the fault lets it."""
        plain = fault == Fault() and not self.hub.bytes_per_second
        if isinstance(content, Path) and plain:
            self.wfile.flush()
            with content.open("rb") as source:
                for at in range(start, end, _FILE_STEP):
                    count = min(end - at, _FILE_STEP)
                    self.record.sent += count
                    self.connection.sendfile(source, at, count)
            return
        data = bytes_of(content) + b"\0" * fault.longer
        if fault.flip >= 0:
            data = data[: fault.flip] + bytes([data[fault.flip] ^ 1]) + data[fault.flip + 1 :]
        limits = [limit for limit in (fault.cut, fault.stall) if limit >= 0]
        stop = min([end, *(start + limit for limit in limits)])
        step = max(16384, int(self.hub.bytes_per_second / 200))
        for at in range(start, stop, step):
            piece = data[at : min(stop, at + step)]
            self.hub.pace(len(piece))
            self.record.sent += len(piece)  # before: a client that has the last byte may ask at once
            self.wfile.write(piece)
        if fault.stall >= 0:
            self.hub.ending.wait(600)
        if limits:
            self.close_connection = True
            with contextlib.suppress(OSError):
                self.connection.shutdown(socket.SHUT_RDWR)


def _range(header: str, size: int) -> tuple[int, int]:
    """The bytes asked for: from, up to (excluded)."""
    if not header.startswith("bytes="):
        return 0, size
    first, _, last = header.removeprefix("bytes=").partition("-")
    return int(first), min(size, int(last) + 1) if last else size


def folder_files(folder: Path) -> dict[str, Content]:
    """The files of a folder as a branch holds them."""
    return {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()}


@contextlib.contextmanager
def served(**repos: Repo) -> Iterator[Hub]:
    """A Hub with these repositories, named ``user/NAME``."""
    with Hub({f"user/{name.replace('_', '-')}": repo for name, repo in repos.items()}) as hub:
        yield hub


def serve_folder(folder: Path, until: Callable[[], object]) -> None:
    """Serve one folder as ``user/model`` until ``until`` returns."""
    with served(model=Repo({"main": folder_files(folder)})) as hub:
        print(hub.url, flush=True)
        until()


if __name__ == "__main__":
    serve_folder(Path(os.path.abspath(sys.argv[1])), sys.stdin.read)
