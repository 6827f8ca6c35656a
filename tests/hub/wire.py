"""Requests, answers and the table of routes; to add a route, write a function under `@route`.

A route takes (hub, request, *unquoted groups of its pattern); it returns a `Response` or raises `Refused`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

KIND, ID, REV = "(models|datasets|spaces)", "([^/]+/[^/]+)", "([^/]+)"
WEB = f"/(datasets/|spaces/)?{ID}"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., Response]]] = []


@dataclass
class Request:
    """What a client asked; `path` is as it was sent, `status` 0 if it got no answer, `time` is `time.monotonic()`."""

    method: str
    path: str
    query: dict[str, list[str]]
    headers: dict[str, str]
    body: bytes
    status: int = 0
    time: float = 0.0
    target: str = ""  # path and query

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def flag(self, name: str) -> bool:
        return self.query.get(name, [""])[0].lower() in ("1", "true")


@dataclass
class Response:
    """An answer; `reset` drops the connection instead, `truncate` closes it after that many bytes of the body."""

    status: int = 200
    body: bytes = b""
    headers: dict[str, str] = field(default_factory=dict)
    reset: bool = False
    truncate: int | None = None


class Refused(Exception):
    """Raised in a route: the answer is an error."""

    def __init__(self, response: Response) -> None:
        self.response = response


def as_json(value: Any, status: int = 200) -> Response:
    return Response(status, json.dumps(value, default=str).encode(), {"Content-Type": "application/json"})


def failure(status: int, code: str, message: str, **headers: str) -> Response:
    response = as_json({"error": message}, status)
    response.headers.update({"X-Error-Message": message, **({"X-Error-Code": code} if code else {}), **headers})
    return response


def refuse(status: int, code: str, message: str, **headers: str) -> Refused:
    return Refused(failure(status, code, message, **headers))


def route(methods: str, pattern: str) -> Callable[[Callable[..., Response]], Callable[..., Response]]:
    def add(function: Callable[..., Response]) -> Callable[..., Response]:
        ROUTES.append((tuple(methods.split()), pattern, function))
        return function

    return add


def kind_of(web: str | None) -> str:
    """Return the kind that a prefix of addresses for people stands for."""
    return web.rstrip("/") if web else "models"
