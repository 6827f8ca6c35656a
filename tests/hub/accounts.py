"""Accounts and repos: who am I, create, delete, move, settings, lists, branches and tags."""

from __future__ import annotations

from typing import TYPE_CHECKING

from hub.access import Token, open_gate, readable, revision_of, signed_in, whoami, writable
from hub.reading import describe
from hub.store import Repo
from hub.wire import ID, KIND, REV, Request, Response, as_json, failure, refuse, route

if TYPE_CHECKING:
    from hub.server import Hub


@route("GET", "/api/whoami-v2")
def who_am_i(hub: Hub, request: Request) -> Response:
    return as_json(whoami(signed_in(hub, request)))


def _named(token: Token, asked: dict) -> tuple[str, str]:
    """Return the kind and id of the repo that the body of a request names."""
    return f"{asked.get('type') or 'model'}s", f"{asked.get('organization') or token.user}/{asked['name']}"


@route("POST", "/api/repos/create")
def create(hub: Hub, request: Request) -> Response:
    token, asked = signed_in(hub, request), request.json()
    kind, repo_id = _named(token, asked)
    repo = hub.repos.get((kind, repo_id))
    if not token.may_write(repo_id):
        namespace = repo_id.split("/")[0]
        raise refuse(403, "", f"You don't have the rights to create a {kind[:-1]} under the namespace {namespace!r}")
    if repo is not None:  # the clients read the address of the repo that is in the way
        return as_json({"error": f"You already created this {kind[:-1]}", "url": f"{hub.url}/{repo.web}"}, 409)
    hub.moved.pop((kind, repo_id), None)
    repo = hub.create(repo_id, kind, private=asked.get("visibility") == "private" or bool(asked.get("private")))
    return as_json({"url": f"{hub.url}/{repo.web}", "name": repo.id})


@route("DELETE", "/api/repos/delete")
def delete(hub: Hub, request: Request) -> Response:
    kind, repo_id = _named(signed_in(hub, request), request.json())
    writable(hub, request, kind, repo_id)
    del hub.repos[kind, repo_id]
    return as_json({})


@route("POST", "/api/repos/move")
def move(hub: Hub, request: Request) -> Response:
    asked = request.json()
    kind, old, new = f"{asked.get('type') or 'model'}s", asked["fromRepo"], asked["toRepo"]
    repo, token = writable(hub, request, kind, old)
    if not token.may_write(new):
        raise refuse(403, "", f"You have no right to create {new}")
    if (kind, new) in hub.repos:
        return failure(409, "", f"{new} exists")
    hub.repos[kind, new] = hub.repos.pop((kind, old))
    hub.moved[kind, old], repo.id = new, new
    hub.moved.pop((kind, new), None)
    return as_json({})


@route("PUT", f"/api/{KIND}/{ID}/settings")
def settings(hub: Hub, request: Request, kind: str, repo_id: str) -> Response:
    repo, _ = writable(hub, request, kind, repo_id)
    asked = request.json()
    if "visibility" in asked or "private" in asked:
        repo.private = asked.get("visibility") == "private" or asked.get("private") is True
    repo.gated = asked.get("gated", repo.gated)
    return as_json({"private": repo.private, "gated": repo.gated})


@route("GET", f"/api/{KIND}")
def list_repos(hub: Hub, request: Request, kind: str) -> Response:
    author, search = (request.query.get(name, [""])[0] for name in ("author", "search"))
    found = []
    for (other, repo_id), repo in hub.repos.items():
        if other == kind and repo_id.startswith(f"{author}/" if author else "") and search in repo_id:
            about = describe(repo, revision_of(repo, "main"))
            if set(request.query.get("filter", [])) <= set(about["tags"]) and _visible(hub, request, repo):
                found.append(about)
    return as_json(found[: int(request.query.get("limit", ["1000"])[0])])


def _visible(hub: Hub, request: Request, repo: Repo) -> bool:
    token = hub.tokens.get(request.headers.get("authorization", "").removeprefix("Bearer "))
    return not repo.private or (token is not None and token.may_read(repo))


@route("GET", f"/api/{KIND}/{ID}/auth-check(/write)?")
def auth_check(hub: Hub, request: Request, kind: str, repo_id: str, write: str | None) -> Response:
    if write:
        writable(hub, request, kind, repo_id)
    open_gate(hub, request, readable(hub, request, kind, repo_id))
    return as_json({})


@route("POST", f"/api/{KIND}/{ID}/branch/{REV}")
def create_branch(hub: Hub, request: Request, kind: str, repo_id: str, name: str) -> Response:
    repo, _ = writable(hub, request, kind, repo_id)
    return _add_ref(repo, f"refs/heads/{name}", name, request.json().get("startingPoint"))


@route("POST", f"/api/{KIND}/{ID}/tag/{REV}")
def create_tag(hub: Hub, request: Request, kind: str, repo_id: str, revision: str) -> Response:
    repo, _ = writable(hub, request, kind, repo_id)
    name = request.json()["tag"]
    return _add_ref(repo, f"refs/tags/{name}", name, revision)


def _add_ref(repo: Repo, ref: str, name: str, revision: str | None) -> Response:
    if name.startswith("refs/"):
        raise refuse(400, "", f"Invalid reference name: {name}")
    if ref in repo.refs:
        raise refuse(409, "", f"Reference already exists: {ref}")
    repo.refs[ref] = revision_of(repo, revision).oid
    return as_json({}, 201)


@route("DELETE", f"/api/{KIND}/{ID}/(branch|tag)/{REV}")
def delete_ref(hub: Hub, request: Request, kind: str, repo_id: str, what: str, name: str) -> Response:
    repo, _ = writable(hub, request, kind, repo_id)
    ref = f"refs/{'heads' if what == 'branch' else 'tags'}/{name}"
    if ref == "refs/heads/main":
        raise refuse(403, "", "The branch main cannot be deleted")
    if repo.refs.pop(ref, None) is None:
        raise refuse(404, "RevisionNotFound", f"Invalid rev id: {name}")
    return as_json({})


@route("POST", f"/api/{KIND}/{ID}/super-squash/{REV}")
def super_squash(hub: Hub, request: Request, kind: str, repo_id: str, name: str) -> Response:
    repo, token = writable(hub, request, kind, repo_id)
    ref = f"refs/heads/{name}"
    if ref not in repo.refs:
        raise refuse(404, "RevisionNotFound", f"Invalid rev id: {name}")
    repo.add(ref, None, repo.commits[repo.refs[ref]].files, request.json()["message"], token.user)
    return as_json({})


@route("GET", "/api/agent-harnesses")
def harnesses(hub: Hub, request: Request) -> Response:
    return as_json({"standardEnvVars": [], "harnesses": {}})


@route("GET HEAD POST", "/api/telemetry/.*|/v1/telemetry")
def telemetry(hub: Hub, request: Request) -> Response:
    return as_json({})


@route("GET HEAD", f"/api/{KIND}/[^/]+(?:/revision/.+)?|/(?!api/)[^/]+/resolve/.+")
def without_namespace(hub: Hub, request: Request, kind: str | None) -> Response:
    """Answer for names like "gpt2": there are none here."""
    return failure(404, "RepoNotFound", "Repository not found")
