"""The Hub's HTTP interface, as far as reading needs it; to add a route, write a function and list it in `ROUTES`.

A route takes (hub, request, *groups of its pattern) and returns a `Response`. `hub.log` has every request in order.
"""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub.store import Commit, Repo, content_id, is_lfs


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    status: int = 0


@dataclass
class Response:
    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)


def as_json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value).encode(), {"Content-Type": "application/json"})


def failure(status: int, code: str, message: str, **headers: str) -> Response:
    response = as_json({"error": message}, status)
    response.headers.update({"X-Error-Code": code, "X-Error-Message": message, **headers})
    return response


class Hub:
    """The server: `with Hub() as hub`, then `hub.url`, `hub.create("user/name")`, `hub.log`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.log: list[Request] = []
        self.faults: list[Callable[[Request], Response | None]] = []  # the first answer that is not None is sent
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def create(self, repo_id: str, kind: str = "models") -> Repo:
        """Create an empty repo, or return the one that is there."""
        return self.repos.setdefault((kind, repo_id), Repo(repo_id, kind))

    def clear_log(self) -> None:
        self.log.clear()
        self.faults.clear()

    def downloads(self, repo_id: str) -> list[str]:
        """Return the paths of one repo whose contents were sent, in order."""
        found = [
            re.fullmatch(rf"/(?:datasets/|spaces/)?{re.escape(repo_id)}/resolve/[^/]+/(.+)", r.path) for r in self.log
        ]
        return [
            m.group(1)
            for m, r in zip(found, self.log, strict=True)
            if m and r.method == "GET" and r.status in (200, 206)
        ]

    def answer(self, request: Request) -> Response:
        for fault in self.faults:
            response = fault(request)
            if response is not None:
                return response
        for methods, pattern, route in ROUTES:
            match = re.fullmatch(pattern, request.path)
            if match and request.method in methods:
                return route(self, request, *(None if g is None else unquote(g) for g in match.groups()))
        return as_json({"error": f"no route for {request.method} {request.path}"}, 404)

    def find(self, kind: str, repo_id: str, revision: str | None) -> tuple[Repo, Commit] | Response:
        """Return a repo and its commit, or the answer that says which of the two is missing."""
        repo = self.repos.get((kind, repo_id))
        if repo is None:
            return failure(404, "RepoNotFound", "Repository not found")
        commit = repo.resolve(revision or "main")
        if commit is None:
            return failure(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return repo, commit


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # keep-alive, as the clients expect

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        request = Request(self.command, url.path, parse_qs(url.query), headers, body)
        response = self.hub.answer(request)
        request.status = response.status
        self.hub.log.append(request)
        self.send_response(response.status)
        for key, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def log_message(self, *args: object) -> None:
        """Stay quiet: `Hub.log` has the requests."""


# ---- routes --------------------------------------------------------------------------------------------------------


def repo_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Response:
    found = hub.find(kind, repo_id, revision)
    if isinstance(found, Response):
        return found
    repo, commit = found
    siblings = [
        {"rfilename": path, "size": len(content), "blobId": content_id(path, content)}
        for path, content in sorted(commit.files.items())
    ]
    date = "2026-01-01T00:00:00.000Z"
    answer = {"id": repo.id, "sha": commit.oid, "private": False, "gated": False, "disabled": False, "tags": []}
    return as_json(
        {**answer, "lastModified": date, "createdAt": date, "downloads": 0, "likes": 0, "siblings": siblings}
    )


def refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    found = hub.find(kind, repo_id, None)
    if isinstance(found, Response):
        return found
    branches = [{"name": n, "ref": f"refs/heads/{n}", "targetCommit": oid} for n, oid in found[0].refs.items()]
    return as_json({"branches": branches, "tags": [], "converts": []})


def tree(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    found = hub.find(kind, repo_id, revision)
    if isinstance(found, Response):
        return found
    files = sorted(found[1].files.items())
    return as_json([{"type": "file", "path": p, "size": len(c), "oid": content_id(p, c)} for p, c in files])


def resolve(hub: Hub, request: Request, web: str | None, repo_id: str, revision: str, path: str) -> Response:
    found = hub.find(web.rstrip("/") if web else "models", repo_id, revision)
    if isinstance(found, Response):
        return found
    commit = found[1]
    content = commit.files.get(path)
    if content is None:
        return failure(404, "EntryNotFound", f"Entry not found: {path}", **{"X-Repo-Commit": commit.oid})
    oid = content_id(path, content)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    if is_lfs(path):
        headers.update({"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))})
    if request.method == "HEAD":
        return Response(200, b"", {**headers, "Content-Length": str(len(content))})
    return _part(content, request.headers.get("range"), headers)


def _part(content: bytes, wanted: str | None, headers: dict[str, str]) -> Response:
    match = re.fullmatch(r"bytes=(\d+)-(\d*)", wanted or "")
    if match is None:
        return Response(200, content, headers)
    start, end = int(match[1]), min(int(match[2] or len(content) - 1), len(content) - 1)
    if start > end:
        return Response(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})


_KIND, _ID, _REV = "(models|datasets|spaces)", "([^/]+/[^/]+)", "([^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Response]]] = [
    (("GET",), f"/api/{_KIND}/{_ID}(?:/revision/{_REV})?", repo_info),
    (("GET",), f"/api/{_KIND}/{_ID}/refs", refs),
    (("GET",), f"/api/{_KIND}/{_ID}/tree/{_REV}", tree),
    (("GET", "HEAD"), f"/(datasets/|spaces/)?{_ID}/resolve/{_REV}/(.+)", resolve),
    (("GET",), "/api/agent-harnesses", lambda hub, request: as_json({"standardEnvVars": [], "harnesses": {}})),
]
