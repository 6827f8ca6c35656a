"""What the Hub stores, in memory: a repo is a set of commits, each a whole tree, and refs that point at them."""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from functools import cached_property
from pathlib import Path

# A small file of one of these is LFS, too: `push_to_hub` deletes a parquet shard once it is told how to upload it.
LFS_SUFFIXES = (
    *(".safetensors", ".parquet", ".arrow", ".bin", ".pt", ".pth", ".onnx", ".npy", ".npz", ".h5", ".msgpack"),
    *(".png", ".jpg", ".jpeg", ".gif", ".wav", ".mp3", ".mp4", ".zip", ".tar", ".gz", ".zst"),
)
REGULAR_LIMIT = 10 * 2**20  # bytes; the Hub takes larger files by LFS only
NO_FILE = "A file with this name doesn't exist"


class Content(bytes):
    """The bytes of a file; the names that git and LFS give them are worked out once."""

    xet: str | None = None  # Xet's name, of a file that came by Xet

    @cached_property
    def sha256(self) -> str:
        return hashlib.sha256(self).hexdigest()

    @cached_property
    def pointer(self) -> bytes:
        """Return what git stores in place of an LFS file."""
        return b"version https://git-lfs.github.com/spec/v1\noid sha256:%s\nsize %d\n" % (
            self.sha256.encode(),
            len(self),
        )

    @cached_property
    def blob(self) -> str:
        return _blob(self)

    @cached_property
    def pointer_blob(self) -> str:
        return _blob(self.pointer)


def _blob(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def is_lfs(path: str, size: int, sample: bytes) -> bool:
    """Return whether a file is stored by LFS; empty files never are."""
    return size > 0 and (path.lower().endswith(LFS_SUFFIXES) or size > REGULAR_LIMIT or b"\0" in sample[:512])


def content_id(path: str, content: Content) -> str:
    """Return what the Hub calls a file's content: sha256 for LFS files, git's blob sha1 for the others."""
    return content.sha256 if is_lfs(path, len(content), content) else content.blob


@dataclass(frozen=True)
class Commit:
    oid: str
    parent: str | None
    title: str
    files: Mapping[str, Content]
    author: str = "user"
    message: str = ""
    date: str = field(default_factory=lambda: now())


def now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.%f")[:-3] + "Z"


@dataclass
class Discussion:
    """A discussion or, with `base`, the commit that it started from, a pull request."""

    num: int
    title: str
    author: str
    base: str | None = None
    status: str = "open"
    merged: str | None = None
    events: list[dict] = field(default_factory=list)
    date: str = field(default_factory=now)


@dataclass
class Repo:
    """A repo starts with one commit, as on the Hub; `refs` maps refs/heads/x, refs/tags/x, refs/pr/1 to commit ids.

    `gated` is False, "auto" or "manual"; `allowed` are the users who may read a gated repo that is not theirs.
    """

    id: str
    kind: str = "models"
    private: bool = False
    gated: bool | str = False
    allowed: set[str] = field(default_factory=set)
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    blobs: dict[str, Content] = field(default_factory=dict)  # LFS files by sha256, committed or only uploaded
    discussions: list[Discussion] = field(default_factory=list)
    created: str = field(default_factory=now)

    def __post_init__(self) -> None:
        self.commit({".gitattributes": b"*.safetensors filter=lfs\n"}, title="initial commit")

    @property
    def web(self) -> str:
        """Return the repo's place in addresses for people: models have no prefix."""
        return self.id if self.kind == "models" else f"{self.kind}/{self.id}"

    @property
    def files(self) -> Mapping[str, Content]:
        """Return what is on main now."""
        return self.commits[self.refs["refs/heads/main"]].files

    def commit(self, files: Mapping[str, bytes | None] | Path, *, branch: str = "main", title: str = "Upload") -> str:
        """Add one commit to `branch` (started at main's head if new); a file given as None is deleted."""
        if isinstance(files, Path):
            files = {p.relative_to(files).as_posix(): p.read_bytes() for p in files.rglob("*") if p.is_file()}
        head = self.resolve(f"refs/heads/{branch}") or self.resolve("main")
        tree = {**(head.files if head else {}), **files}
        tree = {path: content for path, content in tree.items() if content is not None}
        return self.add(f"refs/heads/{branch}", head, tree, title).oid

    def add(
        self, ref: str, parent: Commit | None, tree: Mapping[str, bytes], title: str, author="user", message=""
    ) -> Commit:
        """Store a commit with these files and point `ref` at it."""
        files = {p: c if isinstance(c, Content) else Content(c) for p, c in sorted(tree.items())}
        self.blobs.update({c.sha256: c for p, c in files.items() if is_lfs(p, len(c), c)})
        # NOTE: clients cache by commit id for ever, on disk too: an id must never be used twice.
        commit = Commit(secrets.token_hex(20), parent.oid if parent else None, title, files, author, message)
        self.commits[commit.oid] = commit
        self.refs[ref] = commit.oid
        return commit

    def resolve(self, revision: str) -> Commit | None:
        """Return the commit that a branch, tag, `refs/...` or commit id names, or None."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return self.commits.get(next((self.refs[n] for n in names if n in self.refs), revision))

    def branch(self, revision: str) -> str | None:
        """Return the ref that a commit to `revision` moves: a branch or a pull request, never a tag or commit id."""
        names = (f"refs/heads/{revision}", revision if revision.startswith(("refs/heads/", "refs/pr/")) else "")
        return next((n for n in names if n in self.refs), None)

    def history(self, commit: Commit | None) -> list[Commit]:
        """Return a commit and those before it, newest first."""
        found = []
        while commit is not None:
            found.append(commit)
            commit = self.commits.get(commit.parent or "")
        return found
