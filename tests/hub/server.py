"""The Hub itself: an HTTP server, its log and what tests ask of it; the routes are in the modules imported here."""

from __future__ import annotations

import os
import re
import secrets
import socket
import struct
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub import accounts, cards, discussions, reading, writing, xet  # noqa: F401  (they fill ROUTES)
from hub.access import ROLES, Token, caller
from hub.faults import Fault
from hub.store import Commit, Repo
from hub.wire import ROUTES, Refused, Request, Response, as_json, failure

__all__ = ["Hub", "Request", "Response", "as_json", "failure"]


class Hub:
    """The server: `with Hub() as hub`, then `hub.url`, `hub.create("user/name")`, `hub.token("user")`, `hub.log`."""

    def __init__(self) -> None:
        self.repos: dict[tuple[str, str], Repo] = {}
        self.moved: dict[tuple[str, str], str] = {}
        self.tokens: dict[str, Token] = {}
        self.parts: dict[tuple[str, int], bytes] = {}  # of LFS files on their way, by sha256 and number
        self.xet = xet.Storage()
        self.log: list[Request] = []
        self.faults: list[Fault | Callable[[Request], Response | None]] = []  # the first that strikes answers
        self.lock = threading.RLock()
        self._servers: list[_Server] = []
        self.url = self._serve()
        self.clear_log()

    def __enter__(self) -> Hub:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _serve(self) -> str:
        server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._servers.append(server)
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        return f"http://127.0.0.1:{server.server_address[1]}"

    def other_origin(self) -> str:
        """Return the address of a second server, started at the first call, for what is kept outside of the Hub."""
        if len(self._servers) == 1:
            self._storage = self._serve()
        return self._storage

    def close(self) -> None:
        """Stop: open connections are dropped, later ones refused."""
        for server in self._servers:
            server.shutdown()
            server.server_close()
            server.drop()

    def clear_log(self) -> None:
        """Forget requests and faults, and set the settings back; repos and tokens stay."""
        self.log.clear()
        self.faults.clear()
        self.login_required = False  # True: nothing is read without a token either
        self.page_size = 1000  # entries of a tree or commits in one answer
        self.part_size = 2**30  # bytes; a larger LFS file is sent in parts of this size
        self.lfs_elsewhere = False  # True: LFS files are read by a 302 to a second origin

    # ---- what is there -------------------------------------------------------------------------------------------

    def create(self, repo_id: str, kind: str = "models", **options: Any) -> Repo:
        """Create an empty repo (`private`, `gated` and `allowed` are for `Repo`), or return the one that is there."""
        if (kind, repo_id) not in self.repos:
            self.repos[kind, repo_id] = Repo(repo_id, kind, **options)
        return self.repos[kind, repo_id]

    def repo(self, repo_id: str, kind: str | None = None) -> Repo:
        """Return a repo that is there, of whatever kind."""
        found = [r for (k, name), r in self.repos.items() if name == repo_id and kind in (None, k)]
        if len(found) != 1:
            raise KeyError(f"{len(found)} repos are called {repo_id!r}; say which kind: models, datasets or spaces")
        return found[0]

    def token(self, user: str, role: str = "write", *, orgs: Sequence[str] = (), repos: Sequence[str] = ()) -> str:
        """Return a new token; a fine-grained one may write to `repos` only. `del hub.tokens[token]` revokes it."""
        if role not in ROLES:
            raise ValueError(f"`role` must be one of {ROLES}, got {role!r}")
        token = Token(f"hf_{secrets.token_hex(17)}", user, role, tuple(orgs), tuple(repos))
        self.tokens[token.value] = token
        return token.value

    def fail(self, method: str | None, pattern: str, **options: Any) -> Fault:
        """Make requests fail: method (None for all) and a regular expression found in path?query, percent-encoded.

        Options: times=1 (None for ever), skip=0 (so many are let pass first), status, headers, body; reset=True (RST,
        no answer); truncate=N (N bytes of the body, then FIN); delay=seconds; corrupt=True (right size, wrong bytes);
        call=function of the request, which may do something in between; if it returns a `Response`, that is sent.
        The request has no effect if it is answered by status, reset or call; with after=True it has: only the answer
        is lost. Returns the fault: `hits` counts the requests that it struck.
        """
        fault = Fault(method, pattern, **options)
        self.faults.append(fault)
        return fault

    # ---- what happened -------------------------------------------------------------------------------------------

    def requests(self, method: str | None = None, pattern: str = "") -> list[Request]:
        """Return the requests of a method whose path?query matches, in order."""
        return [r for r in list(self.log) if method in (None, r.method) and re.search(pattern, r.target)]

    def commits(self, repo_id: str, kind: str | None = None, revision: str = "main") -> list[Commit]:
        """Return the commits of a branch, oldest first; the first is made with the repo."""
        repo = self.repo(repo_id, kind)
        return repo.history(repo.resolve(revision))[::-1]

    def downloads(self, repo_id: str) -> list[str]:
        """Return the paths of one repo whose contents were sent, in order."""
        prefix, paths = rf"/(?:datasets/|spaces/)?{re.escape(repo_id)}/resolve/[^/]+/", self._names(repo_id)
        stored = rf"/stored/\w+/{re.escape(repo_id)}/"
        sent = [r for r in self.requests("GET") if r.status in (200, 206)]
        found = [(re.fullmatch(rf"{prefix}(.+)|{stored}(\w+)", r.path)) for r in sent]
        return [unquote(m[1]) if m[1] else paths[m[2]] for m in found if m]

    def uploads(self, repo_id: str) -> list[str]:
        """Return what was sent to a repo, in order: paths, or the sha256 of LFS files that were never committed."""
        paths = self._names(repo_id)
        names = [name for r in list(self.log) if r.status == 200 for name in writing.sent(r, repo_id)]
        return [paths.get(name, name) for name in names]

    def _names(self, repo_id: str) -> dict[str, str]:
        """Return the last path of every content of the repos of this name, by sha256."""
        commits = [c for (_, name), r in list(self.repos.items()) if name == repo_id for c in list(r.commits.values())]
        return {content.sha256: path for commit in commits for path, content in commit.files.items()}

    # ---- answering -----------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Response:
        """Return the answer to a request, perhaps that of a fault."""
        for fault in list(self.faults):
            if not isinstance(fault, Fault):
                response = fault(request)
                if response is not None:
                    return response
                continue
            with self.lock:
                strikes = fault.strikes(request)
            if strikes:
                return fault.apply(request, self._act)
        return self._act(request)

    def _act(self, request: Request) -> Response:
        """Do what a request asks; one at a time, so that a commit sees the head that it moves."""
        try:
            with self.lock:
                if not request.path.startswith("/xet/"):  # which has tokens of its own
                    caller(self, request)
                for methods, pattern, route in ROUTES:
                    match = re.fullmatch(pattern, request.path)
                    if match and request.method in methods:
                        return route(self, request, *(None if g is None else unquote(g) for g in match.groups()))
        except Refused as refused:
            return refused.response
        except Exception:
            # NOTE: a dropped connection would be tried again for a minute, and hide the error.
            return Response(500, traceback.format_exc().encode(), {"Content-Type": "text/plain"})
        return as_json({"error": f"no route for {request.method} {request.path}"}, 404)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, *args: Any) -> None:
        self.open: set[socket.socket] = set()
        super().__init__(*args)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self.open.add(connection)
        return connection, address

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def drop(self) -> None:
        """Close the connections that are kept alive."""
        for connection in list(self.open):
            try:
                connection.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass  # the client was faster

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Stay quiet: what reaches this is a client that went away."""


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"  # keep-alive, as the clients expect
    disable_nagle_algorithm = True

    def _serve(self) -> None:
        url = urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {key.lower(): value for key, value in self.headers.items()}
        query = parse_qs(url.query, keep_blank_values=True)
        request = Request(self.command, url.path, query, headers, body, 0, time.monotonic(), self.path)
        self.hub.log.append(request)
        response = self.hub.answer(request)
        request.status = response.status
        if response.reset:
            self._reset()
        else:
            self._send(response)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _serve

    def _send(self, response: Response) -> None:
        self.send_response(response.status)
        for key, value in {"Content-Length": str(len(response.body)), **response.headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(response.body[: response.truncate])
            self.close_connection |= response.truncate is not None

    def _reset(self) -> None:
        """Close so that the client gets an RST, not an end of file."""
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        os.close(self.connection.detach())

    def log_message(self, *args: object) -> None:
        """Stay quiet: `Hub.log` has the requests."""
