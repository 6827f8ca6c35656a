"""Reading: what a repo is, its files, refs and commits, and their contents."""

from __future__ import annotations

import re
from itertools import pairwise
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, urlencode

from hub.access import open_gate, readable, revision_of
from hub.cards import metadata
from hub.store import Commit, Content, Repo, content_id, is_lfs
from hub.wire import ID, KIND, REV, WEB, Request, Response, as_json, kind_of, refuse, route

if TYPE_CHECKING:
    from hub.server import Hub


def describe(repo: Repo, commit: Commit) -> dict[str, Any]:
    """Return what the Hub says about a repo, without its files."""
    card = metadata(commit.files.get("README.md", b""))
    tags = card.get("tags") or []
    return {
        **{"_id": repo.id, "id": repo.id, "sha": commit.oid, "author": repo.id.split("/")[0]},
        **{"private": repo.private, "gated": repo.gated, "disabled": False, "downloads": 0, "likes": 0},
        **{"lastModified": commit.date, "createdAt": repo.created, "tags": tags if isinstance(tags, list) else []},
        **{"cardData": card, "library_name": card.get("library_name"), "pipeline_tag": card.get("pipeline_tag")},
        **({"modelId": repo.id} if repo.kind == "models" else {}),
    }


@route("GET", f"/api/{KIND}/{ID}(?:/revision/{REV})?")
def repo_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str | None) -> Response:
    repo = readable(hub, request, kind, repo_id)
    commit = revision_of(repo, revision)
    siblings = [{"rfilename": path} for path in commit.files]
    if request.flag("blobs"):
        siblings = [_sibling(path, content) for path, content in commit.files.items()]
    return as_json({**describe(repo, commit), "siblings": siblings})


def _sibling(path: str, content: Content) -> dict[str, Any]:
    entry = file_entry(path, content)
    lfs = {"lfs": {**entry["lfs"], "sha256": content.sha256}} if "lfs" in entry else {}
    return {"rfilename": path, "size": len(content), "blobId": entry["oid"], **lfs}


def file_entry(path: str, content: Content) -> dict[str, Any]:
    """Return a file as a tree lists it."""
    if not is_lfs(path, len(content), content):
        return {"type": "file", "path": path, "size": len(content), "oid": content.blob}
    lfs = {"oid": content.sha256, "size": len(content), "pointerSize": len(content.pointer)}
    return {
        "type": "file",
        "path": path,
        "size": len(content),
        "oid": content.pointer_blob,
        "lfs": lfs,
        **_xet(content),
    }


def _xet(content: Content) -> dict[str, str]:
    return {"xetHash": content.xet} if content.xet else {}


def entries(commit: Commit, folder: str, recursive: bool) -> list[dict[str, Any]]:
    """Return the files and folders in a folder ("" is the root)."""
    prefix = f"{folder}/" if folder else ""
    found: dict[str, dict[str, Any]] = {}
    for path, content in commit.files.items():
        if not path.startswith(prefix):
            continue
        parts = path[len(prefix) :].split("/")
        for depth in range(1, len(parts) if recursive else min(len(parts), 2)):
            inner = prefix + "/".join(parts[:depth])
            oid = Content(inner.encode() + commit.oid.encode()).blob
            found.setdefault(inner, {"type": "directory", "path": inner, "oid": oid, "size": 0})
        if recursive or len(parts) == 1:
            found[path] = file_entry(path, content)
    return list(found.values())


def with_last_commit(repo: Repo, commit: Commit, entry: dict[str, Any]) -> dict[str, Any]:
    """Add the commit that changed a file or anything in a folder last."""
    path = entry["path"]

    def part(one: Commit) -> dict[str, Content]:
        return {p: c for p, c in one.files.items() if p == path or p.startswith(f"{path}/")}

    past = repo.history(commit)
    last = next((a for a, b in pairwise(past) if part(a) != part(b)), past[-1])
    return {**entry, "lastCommit": {"id": last.oid, "title": last.title, "date": last.date}}


def page(hub: Hub, request: Request, found: list[Any]) -> Response:
    """Return a part of a list, and where the next one is."""
    start = int(request.query.get("cursor", ["0"])[0])
    response = as_json(found[start : start + hub.page_size])
    if start + hub.page_size < len(found):
        query = {**request.query, "cursor": [str(start + hub.page_size)]}
        response.headers["Link"] = f'<{hub.url}{request.path}?{urlencode(query, doseq=True)}>; rel="next"'
    return response


@route("GET", f"/api/{KIND}/{ID}/tree/{REV}(?:/(.+))?")
def tree(hub: Hub, request: Request, kind: str, repo_id: str, revision: str, folder: str | None) -> Response:
    repo = readable(hub, request, kind, repo_id)
    commit = revision_of(repo, revision)
    found = entries(commit, folder or "", request.flag("recursive"))
    if folder and not found:
        raise refuse(404, "EntryNotFound", f"{folder} does not exist on {revision!r}")
    if request.flag("expand"):
        found = [with_last_commit(repo, commit, entry) for entry in found]
    return page(hub, request, found)


@route("POST", f"/api/{KIND}/{ID}/paths-info/{REV}")
def paths_info(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo = readable(hub, request, kind, repo_id)
    commit = revision_of(repo, revision)
    json = "json" in request.headers.get("content-type", "")
    form = request.json() if json else parse_qs(request.body.decode())
    everything = {entry["path"]: entry for entry in entries(commit, "", True)}
    found = [everything[path] for path in form.get("paths", []) if path in everything]
    if form.get("expand") in (True, ["true"]):
        found = [with_last_commit(repo, commit, entry) for entry in found]
    return as_json(found)


@route("GET", f"/api/{KIND}/{ID}/refs")
def refs(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repo = readable(hub, request, kind, repo_id)

    def those(prefix: str) -> list[dict[str, str]]:
        found = [(name, oid) for name, oid in repo.refs.items() if name.startswith(prefix)]
        return [{"name": n.removeprefix(prefix), "ref": n, "targetCommit": oid} for n, oid in found]

    answer = {"branches": those("refs/heads/"), "tags": those("refs/tags/"), "converts": []}
    return as_json({**answer, "pullRequests": those("refs/pr/")} if request.flag("include_prs") else answer)


@route("GET", f"/api/{KIND}/{ID}/commits/{REV}")
def commits(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo = readable(hub, request, kind, repo_id)
    found = [
        {"id": c.oid, "title": c.title, "message": c.message, "date": c.date, "authors": [{"user": c.author}]}
        for c in repo.history(revision_of(repo, revision))
    ]
    return page(hub, request, found)


@route("GET HEAD", f"{WEB}/resolve/{REV}/(.+)")
def resolve(hub: Hub, request: Request, web: str | None, repo_id: str, revision: str, path: str) -> Response:
    repo = readable(hub, request, kind_of(web), repo_id)
    open_gate(hub, request, repo)
    commit = revision_of(repo, revision)
    content = commit.files.get(path)
    if content is None:
        raise refuse(404, "EntryNotFound", f"Entry not found: {path}", **{"X-Repo-Commit": commit.oid})
    oid = content_id(path, content)
    headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{oid}"', "Accept-Ranges": "bytes"}
    if not is_lfs(path, len(content), content):
        return _send(request, content, headers)
    headers.update({"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content))})
    if content.xet:
        place = f"{hub.url}/api/{repo.kind}/{repo.id}/xet-read-token/{commit.oid}"
        headers.update({"X-Xet-Hash": content.xet, "Link": f'<{place}>; rel="xet-auth"'})
    if hub.lfs_elsewhere:
        place = f"{hub.other_origin()}/stored/{repo.kind}/{repo.id}/{oid}"
        return Response(302, f"Found. Redirecting to {place}".encode(), {**headers, "Location": place})
    return _send(request, content, headers)


@route("GET HEAD", f"/stored/{KIND}/{ID}/([0-9a-f]+)")
def stored(hub: Hub, request: Request, kind: str, repo_id: str, oid: str) -> Response:
    """Answer at the second origin, where an address is all that is asked for."""
    return _send(request, hub.repos[kind, repo_id].blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _send(request: Request, content: bytes, headers: dict[str, str]) -> Response:
    if request.method == "HEAD":
        return Response(200, b"", {**headers, "Content-Length": str(len(content))})
    match = re.fullmatch(r"bytes=(\d*)-(\d*)", request.headers.get("range", ""))
    if match is None or match[0] == "bytes=-":
        return Response(200, bytes(content), headers)
    start, end = int(match[1] or 0), min(int(match[2] or len(content) - 1), len(content) - 1)
    if not match[1]:  # the last bytes
        start, end = max(0, len(content) - int(match[2])), len(content) - 1
    if start > end:
        return Response(416, b"", {"Content-Range": f"bytes */{len(content)}"})
    return Response(206, content[start : end + 1], {**headers, "Content-Range": f"bytes {start}-{end}/{len(content)}"})
