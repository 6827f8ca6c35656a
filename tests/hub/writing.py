"""Writing files: how each is to be sent, LFS uploads in one piece or in parts, and commits."""

from __future__ import annotations

import base64
import json
import re
from fnmatch import fnmatch
from typing import TYPE_CHECKING, Any

from hub.access import Token, readable, revision_of, signed_in, writable
from hub.discussions import open_pull_request
from hub.store import NO_FILE, Content, Repo, content_id, is_lfs
from hub.wire import ID, KIND, REV, WEB, Request, Response, as_json, kind_of, refuse, route

if TYPE_CHECKING:
    from hub.server import Hub


def sent(request: Request, repo_id: str) -> list[str]:
    """Return what a request brought to a repo: paths, and the sha256 of LFS files."""
    match = re.fullmatch(rf"/lfs/{KIND}/{re.escape(repo_id)}/(\w+)(?:/1)?", request.path)
    if match and request.method == "PUT":
        return [match[2]]
    if not re.match(rf"/api/{KIND}/{re.escape(repo_id)}/commit/", request.path):
        return []
    return [value["path"] for key, value in _lines(request) if key == "file"]


def _lines(request: Request) -> list[tuple[str, Any]]:
    found = [json.loads(line) for line in request.body.splitlines() if line.strip()]
    return [(line["key"], line["value"]) for line in found]


def may_change(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> tuple[Repo, Token]:
    """Return a repo that the caller may commit to: as its owner, or by a pull request of the caller's."""
    opens = request.flag("create_pr")
    repo, token = writable(hub, request, kind, repo_id, proposes=opens or revision.startswith("refs/pr/"))
    if not opens and not token.may_write(repo_id):
        mine = [f"refs/pr/{d.num}" for d in repo.discussions if d.author == token.user]
        if revision not in mine:
            raise refuse(403, "", f"You have no right to write to {revision} of {repo_id}")
    return repo, token


@route("POST", f"/api/{KIND}/{ID}/preupload/{REV}")
def preupload(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo, _ = may_change(hub, request, kind, repo_id, revision)
    commit = revision_of(repo, revision)
    asked = request.json()
    patterns = [line for line in asked.get("gitIgnore", "").splitlines() if line and not line.startswith("#")]
    return as_json({"files": [_mode(file, commit.files.get(file["path"]), patterns) for file in asked["files"]]})


def _mode(file: dict[str, Any], current: Content | None, patterns: list[str]) -> dict[str, Any]:
    """Say how to upload a file, and what is there now: with the same content the client leaves it out."""
    path = file["path"]
    lfs = is_lfs(path, file["size"], base64.b64decode(file["sample"]))
    ignored = any(fnmatch(p, pattern.rstrip("/")) for pattern in patterns for p in (path, *path.split("/")))
    there = {} if current is None else {"oid": content_id(path, current)}
    return {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": ignored, **there}


@route("POST", rf"{WEB}\.git/info/lfs/objects/batch")
def batch(hub: Hub, request: Request, web: str | None, repo_id: str) -> Response:
    repo, _ = writable(hub, request, kind_of(web), repo_id, proposes=True)
    objects = [_object(hub, repo, file["oid"], file["size"]) for file in request.json()["objects"]]
    parts = any("chunk_size" in o.get("actions", {}).get("upload", {}).get("header", {}) for o in objects)
    return as_json({"transfer": "multipart" if parts else "basic", "objects": objects})


def _object(hub: Hub, repo: Repo, oid: str, size: int) -> dict[str, Any]:
    if oid in repo.blobs:
        return {"oid": oid, "size": size}  # without actions nothing is sent
    place = f"{hub.url}/lfs/{repo.kind}/{repo.id}/{oid}"
    upload: dict[str, Any] = {"href": place, "header": {}}
    if size > hub.part_size:
        numbers = range(1, -(-size // hub.part_size) + 1)
        upload["header"] = {"chunk_size": str(hub.part_size), **{f"{n:05}": f"{place}/{n}" for n in numbers}}
        upload["href"] = f"{place}/complete"
    verify = {"href": f"{place}/verify", "header": {}}
    return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": verify}}


def _store(hub: Hub, kind: str, repo_id: str, oid: str, body: bytes) -> Response:
    content = Content(body)
    if content.sha256 != oid:
        raise refuse(400, "", f"The sha256 of the content is {content.sha256}, not {oid}")
    hub.repos[kind, repo_id].blobs[oid] = content
    return Response(200, b"", {"ETag": f'"{oid}"'})


@route("PUT", f"/lfs/{KIND}/{ID}/([0-9a-f]+)")
def put(hub: Hub, request: Request, kind: str, repo_id: str, oid: str) -> Response:
    return _store(hub, kind, repo_id, oid, request.body)


@route("PUT", f"/lfs/{KIND}/{ID}/([0-9a-f]+)/([0-9]+)")
def put_part(hub: Hub, request: Request, kind: str, repo_id: str, oid: str, number: str) -> Response:
    hub.parts[oid, int(number)] = request.body
    return Response(200, b"", {"ETag": f'"{Content(request.body).blob}"'})


@route("POST", f"/lfs/{KIND}/{ID}/([0-9a-f]+)/complete")
def complete(hub: Hub, request: Request, kind: str, repo_id: str, oid: str) -> Response:
    wanted = [(part["partNumber"], part["etag"]) for part in request.json()["parts"]]
    there = {n: body for (o, n), body in hub.parts.items() if o == oid}
    if wanted != [(n, f'"{Content(body).blob}"') for n, body in sorted(there.items())]:
        raise refuse(400, "", f"The parts are {sorted(there)}, not {wanted}")
    hub.parts = {key: body for key, body in hub.parts.items() if key[0] != oid}
    return _store(hub, kind, repo_id, oid, b"".join(body for _, body in sorted(there.items())))


@route("POST", f"/lfs/{KIND}/{ID}/([0-9a-f]+)/verify")
def verify(hub: Hub, request: Request, kind: str, repo_id: str, oid: str) -> Response:
    signed_in(hub, request)
    blob = readable(hub, request, kind, repo_id).blobs.get(oid)
    if blob is None or len(blob) != request.json()["size"]:
        raise refuse(404, "", f"No object {oid} of this size")
    return as_json({"success": True})


@route("POST", f"/api/{KIND}/{ID}/commit/{REV}")
def commit(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo, token = may_change(hub, request, kind, repo_id, revision)
    ref = repo.branch(revision)
    if ref is None:
        raise refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}; only branches take commits")
    lines = _lines(request)
    header = next(value for key, value in lines if key == "header")
    parent, head = header.get("parentCommit"), repo.commits[repo.refs[ref]]
    if request.flag("create_pr"):
        head = revision_of(repo, parent) if parent else head
    elif parent not in (None, head.oid):
        raise refuse(412, "", "A commit has happened since. Please refresh and try again.")
    files = _changed(repo, dict(head.files), lines)
    answer = {"success": True}
    if request.flag("create_pr"):
        opened = open_pull_request(repo, head, token.user, header["summary"], header.get("description", ""))
        ref = f"refs/pr/{opened.num}"
        answer["pullRequestUrl"] = f"{hub.url}/{repo.web}/discussions/{opened.num}"
    new = repo.add(ref, head, files, header["summary"], token.user, header.get("description", ""))
    return as_json({**answer, "commitOid": new.oid, "commitUrl": f"{hub.url}/{repo.web}/commit/{new.oid}"})


def _changed(repo: Repo, files: dict[str, Content], lines: list[tuple[str, Any]]) -> dict[str, Content]:
    """Return the files after a commit's operations, in their order."""
    for key, value in lines:
        if key == "file":
            files[value["path"]] = Content(base64.b64decode(value["content"]))
        elif key == "lfsFile":
            if value["oid"] not in repo.blobs:
                raise refuse(400, "", f"LFS pointer of {value['path']} points to a file that does not exist")
            files[value["path"]] = repo.blobs[value["oid"]]
        elif key in ("deletedFile", "deletedFolder"):
            folder = value["path"].rstrip("/") + "/" if key == "deletedFolder" else None
            gone = [p for p in files if (p.startswith(folder) if folder else p == value["path"])]
            if not gone:
                raise refuse(404, "EntryNotFound", NO_FILE)
            files = {path: content for path, content in files.items() if path not in gone}
        elif key != "header":
            raise refuse(400, "", f"Unknown operation {key!r}")
    return files
