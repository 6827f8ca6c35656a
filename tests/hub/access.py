"""Who may do what: tokens and their roles, private and gated repos, and the errors the Hub answers with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from hub.store import Commit, Repo
from hub.wire import Request, refuse

if TYPE_CHECKING:
    from hub.server import Hub

ROLES = ("read", "write", "fine-grained")


@dataclass(frozen=True)
class Token:
    value: str
    user: str
    role: str
    orgs: tuple[str, ...] = ()
    repos: tuple[str, ...] = ()  # of a fine-grained token: all that it may write, and may read if private

    def owns(self, repo_id: str) -> bool:
        """Return whether a repo is in the user's or an organization's namespace."""
        return repo_id.split("/")[0] in (self.user, *self.orgs)

    def may_write(self, repo_id: str) -> bool:
        if self.role == "fine-grained":
            return repo_id in self.repos
        return self.role == "write" and self.owns(repo_id)

    def may_read(self, repo: Repo) -> bool:
        if not repo.private:
            return True
        return repo.id in self.repos if self.role == "fine-grained" else self.owns(repo.id)


def caller(hub: Hub, request: Request) -> Token | None:
    """Return whose request it is, None for nobody's; an unknown token is refused everywhere."""
    value = request.headers.get("authorization", "").removeprefix("Bearer ")
    if not value:
        return None
    if value not in hub.tokens:
        raise refuse(401, "", "Invalid credentials in Authorization header")
    return hub.tokens[value]


def signed_in(hub: Hub, request: Request) -> Token:
    token = caller(hub, request)
    if token is None:
        raise refuse(401, "", "Invalid username or password.")
    return token


def readable(hub: Hub, request: Request, kind: str, repo_id: str) -> Repo:
    """Return a repo that the caller may see."""
    token = caller(hub, request)
    if token is None and hub.login_required:
        raise refuse(401, "RepoNotFound", "Repository not found")
    repo = hub.repos.get((kind, repo_id))
    if repo is None and (kind, repo_id) in hub.moved:
        moved = refuse(307, "", "Moved")
        moved.response.headers["Location"] = request.target.replace(repo_id, hub.moved[kind, repo_id], 1)
        raise moved
    if repo is None or (repo.private and not (token and token.may_read(repo))):
        # NOTE: only over https the clients take a bare 401 for a missing repo; the code says it over http.
        raise refuse(404 if token else 401, "RepoNotFound", "Repository not found")
    return repo


def revision_of(repo: Repo, revision: str | None) -> Commit:
    commit = repo.resolve(revision or "main")
    if commit is None:
        raise refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
    return commit


def open_gate(hub: Hub, request: Request, repo: Repo) -> None:
    """Refuse the files of a gated repo to all but its owners and the users it lets in."""
    token = caller(hub, request)
    if not repo.gated or (token and (token.owns(repo.id) or token.user in repo.allowed)):
        return
    who = "must be authenticated to access it" if token is None else "are not in the authorized list"
    message = f"Access to {repo.kind[:-1]} {repo.id} is restricted and you {who}."
    raise refuse(403 if token else 401, "GatedRepo", message)


def writable(hub: Hub, request: Request, kind: str, repo_id: str, *, proposes: bool = False) -> tuple[Repo, Token]:
    """Return a repo that the caller may write to, or with `proposes` open a pull request in, and the caller."""
    token = signed_in(hub, request)
    repo = readable(hub, request, kind, repo_id)
    if not proposes and not token.may_write(repo_id):
        raise refuse(403, "", f"You have no right to write to {repo_id}; pass `create_pr=1` to open a pull request")
    return repo, token


def whoami(token: Token) -> dict[str, object]:
    role = "fineGrained" if token.role == "fine-grained" else token.role
    access: dict[str, object] = {"displayName": "test", "role": role}
    if role == "fineGrained":
        scopes = [{"entity": {"type": "model", "name": r}, "permissions": ["repo.write"]} for r in token.repos]
        access["fineGrained"] = {"scoped": scopes, "global": []}
    orgs = [{"type": "org", "name": name, "fullname": name, "roleInOrg": "write"} for name in token.orgs]
    user = {"type": "user", "id": token.user, "name": token.user, "fullname": token.user, "email": None}
    return {
        **user,
        "isPro": False,
        "canPay": False,
        "orgs": orgs,
        "auth": {"type": "access_token", "accessToken": access},
    }
