"""What the Hub stores, in memory: a repo is a set of commits, each a whole tree, and refs that point at them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

LFS_SUFFIXES = (".safetensors", ".parquet", ".bin", ".pt", ".png", ".jpg", ".arrow")


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, bytes]


@dataclass
class Repo:
    """A repo starts with one commit, as on the Hub; `refs` maps branch or tag to commit id."""

    id: str
    kind: str = "models"
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, title="initial commit")

    def commit(self, files: Mapping[str, bytes | None] | Path, *, branch: str = "main", title: str = "Upload") -> str:
        """Add one commit to `branch` (started at main's head if new); a file given as None is deleted."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        head = self.resolve(branch) or self.resolve("main")
        tree = {**(head.files if head else {}), **files}
        tree = {path: content for path, content in tree.items() if content is not None}
        # NOTE: clients cache by commit id for ever, on disk too: an id must never be used twice.
        commit = Commit(secrets.token_hex(20), head.oid if head else None, title, tree)
        self.commits[commit.oid] = commit
        self.refs[branch] = commit.oid
        return commit.oid

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit that a branch, tag, `refs/...` or commit id names, or None."""
        return self.commits.get(self.refs.get(revision.removeprefix("refs/heads/"), revision))


def is_lfs(path: str) -> bool:
    return path.endswith(LFS_SUFFIXES)


def content_id(path: str, content: bytes) -> str:
    """Return what the Hub calls a file's content: sha256 for LFS files, git's blob sha1 for the others."""
    if is_lfs(path):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
