"""Discussions and pull requests: open, read, list, comment, change, merge."""

from __future__ import annotations

import difflib
import secrets
from typing import TYPE_CHECKING, Any

from hub.access import readable, writable
from hub.store import Commit, Content, Discussion, Repo, now
from hub.wire import ID, KIND, Request, Response, as_json, refuse, route

if TYPE_CHECKING:
    from hub.server import Hub

_PAGE = 50  # discussions in one answer


def open_pull_request(repo: Repo, base: Commit, author: str, title: str, description: str) -> Discussion:
    """Open a pull request whose branch refs/pr/N starts at `base`."""
    opened = _open(repo, author, title, description)
    opened.base = base.oid
    repo.refs[f"refs/pr/{opened.num}"] = base.oid
    return opened


def _open(repo: Repo, author: str, title: str, description: str) -> Discussion:
    opened = Discussion(len(repo.discussions) + 1, title, author)
    _note(opened, "comment", author, {"edited": False, "hidden": False, "latest": {"raw": description}})
    repo.discussions.append(opened)
    return opened


def _note(discussion: Discussion, kind: str, author: str, data: dict[str, Any]) -> dict[str, Any]:
    event = {"id": secrets.token_hex(8), "type": kind, "createdAt": now(), "author": {"name": author}, "data": data}
    discussion.events.append(event)
    return event


def _brief(repo: Repo, one: Discussion) -> dict[str, Any]:
    return {
        **{"num": one.num, "title": one.title, "status": one.status, "author": {"name": one.author}},
        **{"isPullRequest": one.base is not None, "createdAt": one.date},
        "repo": {"name": repo.id, "type": repo.kind[:-1]},
    }


def _find(repo: Repo, num: str) -> Discussion:
    if not 0 < int(num) <= len(repo.discussions):
        raise refuse(404, "", f"Discussion {num} not found")
    return repo.discussions[int(num) - 1]


@route("POST", f"/api/{KIND}/{ID}/discussions")
def create(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repo, token = writable(hub, request, kind, repo_id, proposes=True)
    asked = request.json()
    if asked.get("pullRequest"):
        head = repo.commits[repo.refs["refs/heads/main"]]
        opened = open_pull_request(repo, head, token.user, asked["title"], asked["description"])
        opened.status = "draft"
    else:
        opened = _open(repo, token.user, asked["title"], asked["description"])
    return as_json({"num": opened.num, "pullRequest": opened.base is not None})


@route("GET", f"/api/{KIND}/{ID}/discussions")
def list_discussions(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repo = readable(hub, request, kind, repo_id)
    wanted, status, author = (request.query.get(name, ["all"])[0] for name in ("type", "status", "author"))
    closed = {"open": ("open", "draft"), "closed": ("closed", "merged")}
    found = [
        _brief(repo, d)
        for d in reversed(repo.discussions)
        if wanted in ("all", "pull_request" if d.base else "discussion")
        and (status == "all" or d.status in closed[status])
        and author in ("all", d.author)
    ]
    start = int(request.query.get("p", ["0"])[0]) * _PAGE
    return as_json({"discussions": found[start : start + _PAGE], "count": len(found), "start": start})


@route("GET", f"/api/{KIND}/{ID}/discussions/([0-9]+)")
def details(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> Response:
    repo = readable(hub, request, kind, repo_id)
    one = _find(repo, num)
    answer = {**_brief(repo, one), "events": one.events}
    if one.base is not None:
        merged = {"mergeCommitId": one.merged} if one.merged else {}
        answer["changes"] = {"base": "refs/heads/main", **merged}
        answer["filesWithConflicts"] = [] if one.merged else _conflicts(repo, one)
        answer["diff"] = _diff(repo, one)
    return as_json(answer)


def _changes(repo: Repo, one: Discussion, head: str) -> dict[str, Content | None]:
    """Return what differs at `head` from where a pull request started; None for a file that is gone."""
    old, new = repo.commits[one.base or ""].files, repo.commits[head].files
    return {path: new.get(path) for path in {**old, **new} if old.get(path) != new.get(path)}


def _conflicts(repo: Repo, one: Discussion) -> list[str]:
    theirs = _changes(repo, one, repo.refs["refs/heads/main"])
    ours = _changes(repo, one, repo.refs[f"refs/pr/{one.num}"])
    return sorted(path for path in ours if path in theirs and ours[path] != theirs[path])


def _diff(repo: Repo, one: Discussion) -> str:
    old = repo.commits[one.base or ""].files
    lines: list[str] = []
    for path, content in _changes(repo, one, repo.refs[f"refs/pr/{one.num}"]).items():
        before, after = ((c or b"").decode(errors="replace").splitlines() for c in (old.get(path), content))
        lines += difflib.unified_diff(before, after, f"a/{path}", f"b/{path}", lineterm="")
    return "\n".join(lines)


@route("POST", f"/api/{KIND}/{ID}/discussions/([0-9]+)/merge")
def merge(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> Response:
    repo, token = writable(hub, request, kind, repo_id)
    one = _find(repo, num)
    if one.base is None or one.status in ("merged", "closed"):
        raise refuse(400, "", f"Discussion {num} is not an open pull request")
    conflicts = _conflicts(repo, one)
    if conflicts:
        raise refuse(409, "", f"Merge conflicts in {', '.join(conflicts)}")
    head = repo.commits[repo.refs["refs/heads/main"]]
    files = {**head.files, **_changes(repo, one, repo.refs[f"refs/pr/{num}"])}
    kept = {path: content for path, content in files.items() if content is not None}
    one.merged = repo.add("refs/heads/main", head, kept, f"{one.title} (#{num})", token.user).oid
    one.status = "merged"
    _note(one, "status-change", token.user, {"status": "merged"})
    return as_json({"commitOid": one.merged})


@route("POST", f"/api/{KIND}/{ID}/discussions/([0-9]+)/comment")
def comment(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> Response:
    repo, token = writable(hub, request, kind, repo_id, proposes=True)
    data = {"edited": False, "hidden": False, "latest": {"raw": request.json()["comment"]}}
    return as_json({"newMessage": _note(_find(repo, num), "comment", token.user, data)})


@route("POST", f"/api/{KIND}/{ID}/discussions/([0-9]+)/status")
def status(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> Response:
    repo, token = _changing(hub, request, kind, repo_id, num)
    one, new = _find(repo, num), request.json()["status"]
    one.status = new
    return as_json({"newStatus": _note(one, "status-change", token.user, {"status": new})})


@route("POST", f"/api/{KIND}/{ID}/discussions/([0-9]+)/title")
def title(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> Response:
    repo, token = _changing(hub, request, kind, repo_id, num)
    one, new = _find(repo, num), request.json()["title"]
    event = _note(one, "title-change", token.user, {"from": one.title, "to": new})
    one.title = new
    return as_json({"newTitle": event})


def _changing(hub: Hub, request: Request, kind: str, repo_id: str, num: str) -> tuple[Repo, Any]:
    """Return the repo and the caller, who opened the discussion or may write to the repo."""
    repo, token = writable(hub, request, kind, repo_id, proposes=True)
    if _find(repo, num).author != token.user:
        writable(hub, request, kind, repo_id)
    return repo, token
