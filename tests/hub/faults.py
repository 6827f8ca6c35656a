"""Scripted faults: errors, lost answers, cut, slow and wrong ones; before the action takes place or after it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from time import sleep  # bound here: tests replace `time.sleep` to spare the clients their waits

from hub.wire import Request, Response

_INVERTED = bytes(255 - byte for byte in range(256))


@dataclass
class Fault:
    """What happens to the requests whose method and path (as sent, with the query) match; see `Hub.fail`."""

    method: str | None
    pattern: str
    times: int | None = 1
    skip: int = 0
    status: int | None = None
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes | str | None = None
    reset: bool = False
    truncate: int | None = None
    delay: float = 0.0
    corrupt: bool = False
    after: bool = False
    call: Callable[[Request], object] | None = None
    hits: int = 0  # how many requests it has struck

    def strikes(self, request: Request) -> bool:
        """Count a request, and return whether the fault applies to it."""
        if self.method not in (None, request.method) or not re.search(self.pattern, request.target):
            return False
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times is not None and self.hits >= self.times:
            return False
        self.hits += 1
        return True

    def apply(self, request: Request, action: Callable[[Request], Response]) -> Response:
        """Return the answer to a request that is struck; without one of its own, the action's, perhaps spoiled."""
        if self.after:
            response = action(request)
            return self._answer(request) or self._spoil(response)
        return self._answer(request) or self._spoil(action(request))

    def _answer(self, request: Request) -> Response | None:
        sleep(self.delay)
        response = self.call(request) if self.call else None
        if isinstance(response, Response):
            return response
        if self.reset:
            return Response(0, reset=True)
        if self.status is None:
            return None
        body = json.dumps({"error": f"scripted fault {self.status}"}) if self.body is None else self.body
        return Response(self.status, body.encode() if isinstance(body, str) else body, dict(self.headers))

    def _spoil(self, response: Response) -> Response:
        response.headers.update(self.headers)
        response.truncate = self.truncate
        if self.body is not None:
            response.body = self.body.encode() if isinstance(self.body, str) else self.body
        if self.corrupt:
            response.body = response.body.translate(_INVERTED)
        return response
