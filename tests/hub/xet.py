"""Xet: the storage that the clients send LFS files to unless HF_HUB_DISABLE_XET is set, as far as they need it.

A file is cut into chunks, which travel in "xorbs"; a "shard" says which chunks of which xorbs make up which file.
NOTE: chunks are packed with LZ4, which the standard library lacks; pyarrow has it.
"""

from __future__ import annotations

import re
import secrets
import struct
import time
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from hub.access import open_gate, readable, writable
from hub.store import Content
from hub.wire import ID, KIND, REV, Request, Response, as_json, refuse, route

if TYPE_CHECKING:
    from hub.server import Hub

_HASH = "([0-9a-f]{64})"
_HEADER, _ENTRY = 48, 48  # bytes, of a shard and of everything in it
_HAS_CHECKS, _HAS_METADATA = 1 << 31, 1 << 30
_END = b"\xff" * 32


@dataclass
class Xorb:
    body: bytes  # chunks as they came, each with a header of 8 bytes
    bounds: list[int]  # where each chunk begins in `body`, and the end of the last
    chunks: list[bytes]


@dataclass
class Storage:
    """What Xet knows: one storage for all repos; a token is for one of them."""

    xorbs: dict[str, Xorb] = field(default_factory=dict)
    files: dict[str, list[tuple[str, int, int]]] = field(default_factory=dict)  # xorb, first chunk, one after the last
    tokens: dict[str, tuple[str, str]] = field(default_factory=dict)


@route("GET", f"/api/{KIND}/{ID}/xet-(read|write)-token/{REV}")
def token(hub: Hub, request: Request, kind: str, repo_id: str, right: str, revision: str) -> Response:
    if right == "write":
        proposes = request.flag("create_pr") or revision.startswith("refs/pr/")
        writable(hub, request, kind, repo_id, proposes=proposes)
    else:
        open_gate(hub, request, readable(hub, request, kind, repo_id))
    value, expires = f"xet_{secrets.token_hex(16)}", int(time.time()) + 3600
    hub.xet.tokens[value] = kind, repo_id
    url = f"{hub.url}/xet"
    response = as_json({"accessToken": value, "exp": expires, "casUrl": url})
    headers = {"X-Xet-Access-Token": value, "X-Xet-Token-Expiration": str(expires), "X-Xet-Cas-Url": url}
    response.headers.update(headers)
    return response


def _repo_of(hub: Hub, request: Request) -> tuple[str, str]:
    """Return the kind and id that the token of a request to the storage is for."""
    value = request.headers.get("authorization", "").removeprefix("Bearer ")
    if value not in hub.xet.tokens:
        raise refuse(401, "", "Invalid Xet token")
    return hub.xet.tokens[value]


@route("POST", f"/xet/v1/xorbs/default/{_HASH}")
def put_xorb(hub: Hub, request: Request, name: str) -> Response:
    _repo_of(hub, request)
    inserted = name not in hub.xet.xorbs
    hub.xet.xorbs[name] = _read_xorb(request.body)
    return as_json({"was_inserted": inserted})


def _read_xorb(body: bytes) -> Xorb:
    bounds, chunks = [0], []
    while bounds[-1] < len(body) and body[bounds[-1]] == 0:  # then comes a footer, or nothing
        start = bounds[-1]
        packed, size = (int.from_bytes(body[start + at : start + at + 3], "little") for at in (1, 5))
        chunks.append(_unpack(body[start + 8 : start + 8 + packed], body[start + 4], size))
        bounds.append(start + 8 + packed)
    return Xorb(body, bounds, chunks)


def _unpack(data: bytes, scheme: int, size: int) -> bytes:
    """Return a chunk that came raw (0), LZ4 (1), or as LZ4 of every fourth byte, four times (2)."""
    if scheme == 0:
        return data
    plain = pa.Codec("lz4").decompress(data, size, asbytes=True)
    if scheme == 1:
        return plain
    chunk, at = bytearray(size), 0
    for first in range(4):
        count = len(range(first, size, 4))
        chunk[first::4] = plain[at : at + count]
        at += count
    return bytes(chunk)


@route("POST", "/xet/v1/shards")
def put_shard(hub: Hub, request: Request) -> Response:
    kind, repo_id = _repo_of(hub, request)
    repo = hub.repos[kind, repo_id]
    for name, terms in _read_shard(request.body).items():
        missing = [xorb for xorb, _, _ in terms if xorb not in hub.xet.xorbs]
        if missing:
            raise refuse(400, "", f"Xorbs {missing} are not stored")
        content = Content(b"".join(c for x, start, end in terms for c in hub.xet.xorbs[x].chunks[start:end]))
        repo.blobs.setdefault(content.sha256, content).xet = name
        hub.xet.files[name] = terms
    return as_json({"result": 1})


def _read_shard(body: bytes) -> dict[str, list[tuple[str, int, int]]]:
    found: dict[str, list[tuple[str, int, int]]] = {}
    at = _HEADER
    while body[at : at + 32] != _END:
        flags, count = struct.unpack_from("<II", body, at + 32)
        terms = [at + _ENTRY * (i + 1) for i in range(count)]
        found[_name(body, at)] = [(_name(body, t), *struct.unpack_from("<II", body, t + 40)) for t in terms]
        checks, metadata = count if flags & _HAS_CHECKS else 0, bool(flags & _HAS_METADATA)
        at += _ENTRY * (1 + count + checks + metadata)
    return found


def _name(body: bytes, at: int) -> str:
    """Return a hash as addresses have it: four little-endian numbers of 64 bits."""
    return "".join(f"{part:016x}" for part in struct.unpack_from("<4Q", body, at))


@route("GET", f"/xet/v1/reconstructions/{_HASH}")
def reconstruct(hub: Hub, request: Request, name: str) -> Response:
    """Say which chunks make up a file, or the part of it that is asked for, and where to get them."""
    _repo_of(hub, request)
    if name not in hub.xet.files:
        raise refuse(404, "", f"File {name} is not stored")
    chunks = [(xorb, i) for xorb, start, end in hub.xet.files[name] for i in range(start, end)]
    ends = list(accumulate((len(hub.xet.xorbs[x].chunks[i]) for x, i in chunks), initial=0))
    asked = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers.get("range", ""))
    first, last = (int(asked[1]), int(asked[2] or ends[-1])) if asked else (0, ends[-1])
    if first >= ends[-1]:
        return Response(416)
    wanted = [
        (c, start) for c, (start, end) in zip(chunks, pairwise(ends), strict=True) if start <= last and end > first
    ]
    runs = _runs([chunk for chunk, _ in wanted])
    # NOTE: the places must not overlap, or the client takes one for another: a chunk may be in several terms.
    places = _runs(sorted({chunk for chunk, _ in wanted}))
    return as_json(
        {
            "offset_into_first_range": first - wanted[0][1],
            "terms": [_term(hub.xet.xorbs[x], x, start, end) for x, start, end in runs],
            "fetch_info": {x: [_place(hub, *p) for p in places if p[0] == x] for x, _, _ in places},
        }
    )


def _runs(chunks: list[tuple[str, int]]) -> list[tuple[str, int, int]]:
    """Join chunks that follow each other: one term for each chunk would be a request for each."""
    found: list[tuple[str, int, int]] = []
    for xorb, i in chunks:
        if found and found[-1][0] == xorb and found[-1][2] == i:
            found[-1] = (xorb, found[-1][1], i + 1)
        else:
            found.append((xorb, i, i + 1))
    return found


def _term(xorb: Xorb, name: str, start: int, end: int) -> dict[str, Any]:
    size = sum(map(len, xorb.chunks[start:end]))
    return {"hash": name, "range": {"start": start, "end": end}, "unpacked_length": size}


def _place(hub: Hub, name: str, start: int, end: int) -> dict[str, Any]:
    bounds = hub.xet.xorbs[name].bounds
    inclusive = {"start": bounds[start], "end": bounds[end] - 1}
    return {"range": {"start": start, "end": end}, "url": f"{hub.url}/xet/stored/{name}", "url_range": inclusive}


@route("GET", f"/xet/stored/{_HASH}")
def get_xorb(hub: Hub, request: Request, name: str) -> Response:
    body = hub.xet.xorbs[name].body
    asked = re.fullmatch(r"bytes=(\d+)-(\d+)", request.headers.get("range", ""))
    if asked is None:
        return Response(200, body)
    start, end = int(asked[1]), int(asked[2])
    return Response(206, body[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(body)}"})


@route("GET POST", "/xet/.*")
def without(hub: Hub, request: Request) -> Response:
    """Answer for what the clients do without: dedup over all of the Hub, and the second version of the routes."""
    return as_json({"error": "not found"}, 404)


@route("POST", f"/api/{KIND}/{ID}/lfs-files/duplicate")
def duplicate(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    """Copy LFS files to another repo; the clients ask for it for files that have a Xet hash only."""
    source, asked = readable(hub, request, kind, repo_id), request.json()
    target, _ = writable(hub, request, f"{asked['target']['type']}s", asked["target"]["name"])
    known = {f["sha256"]: source.blobs.get(f["sha256"]) for f in asked["files"]}
    target.blobs.update({oid: content for oid, content in known.items() if content is not None})
    return as_json({"failed": [{"sha256": o, "error": "not found"} for o, c in known.items() if c is None]})
