"""What is read from the Hub: which commit, which file, and whether its bytes are those that the Hub names.

Read `pin` (a branch becomes a commit once, and everything is read at that commit), `find_file`, then `verify`.
"""

from __future__ import annotations

import hashlib
import os
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import (
    _CACHED_NO_EXIST,
    HfApi,
    constants,
    file_exists,
    get_hf_file_metadata,
    hf_hub_download,
    hf_hub_url,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
)

from hf_mimic.hub_errors import HubError, explain, hub_errors, is_transient, retry_after

_COMMIT = re.compile(r"[0-9a-f]{40}")
_CHUNK = 1 << 22
_PAUSES = (1.0, 2.0, 4.0)  # seconds between tries: the clients ask only once which commit it is
_PATIENCE = 60.0
_KINDS = {"model": "model", "dataset": "data set", "space": "space"}
_verified: set[tuple[str, int, int, int]] = set()  # path, inode, time and size


def on_hub(reference: object) -> bool:
    """Return whether a reference is a repo id: not a folder, a model or a state dict."""
    return isinstance(reference, str) and not Path(reference).is_dir() and not reference.startswith((".", "/", "~"))


class _AskInTime(HfApi):
    """Gives up on a Hub that does not answer; the client itself would wait for ever, with all there is in the cache."""

    def repo_info(self, *args: Any, **kwargs: Any) -> Any:
        return super().repo_info(*args, timeout=constants.HF_HUB_ETAG_TIMEOUT, **kwargs)


def pin(reference: object, revision: str | None = None, *, repo_type: str = "model") -> str | None:
    """Return the commit (40 hexadecimal digits) that a branch or tag names now; None for what is not on the Hub.

    Whoever reads several files pins first: a branch may move between two of them. It takes one request, none for a
    commit; without the Hub the cache knows what the branch was when it was last read.

    Args:
        reference: Hub repo id; for a folder, a model or a state dict there is no commit.
        revision: Branch, tag or commit; by default the main branch.
        repo_type: "model", "dataset" or "space".

    Raises:
        FileNotFoundError: If it is the path of a folder that does not exist.
        HubError: If there is no such repo or revision, it is closed to this login, or the Hub cannot be asked.
    """
    if not isinstance(reference, (str, Path)) or not _is_repo(reference):
        return None
    if revision is not None and _COMMIT.fullmatch(revision):
        return revision
    repo, pauses = str(reference), list(_PAUSES)
    while True:
        try:
            found = _AskInTime().resolve_revision(
                repo, revision=revision, repo_type=repo_type, local_files_only=is_offline_mode()
            )
        except hub_errors() as error:
            if not pauses or not is_transient(error):
                step = f"looking up {revision or 'the main branch'}"
                raise refusal(error, repo, step, repo_type) from None
            time.sleep(min(max(pauses.pop(0), retry_after(error) or 0), _PATIENCE))
        else:
            return found.resolved


def find_file(reference: str | Path, name: str, revision: str | None, *, repo_type: str = "model") -> Path | None:
    """Return the local path of one file of a folder or Hub repo (downloaded if needed, and verified), or None.

    Args:
        reference: Hub repo id or folder.
        name: Path in the repo.
        revision: Branch, tag or commit; a commit costs no request for a file that is in the cache.
        repo_type: "model", "dataset" or "space".

    Raises:
        FileNotFoundError: If it is the path of a folder that does not exist.
        HubError: If the file cannot be had, or has other bytes than the Hub says.
    """
    if not _is_repo(reference):
        path = Path(reference) / name
        return path if path.is_file() else None
    repo, commit = str(reference), pin(reference, revision, repo_type=repo_type)
    cached = try_to_load_from_cache(repo, name, revision=commit, repo_type=repo_type)
    if cached is _CACHED_NO_EXIST:  # a commit does not change
        return None
    try:
        return verify(Path(hf_hub_download(repo, name, revision=commit, repo_type=repo_type)))
    except hub_errors() as error:
        missing = isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError)
        if missing or (isinstance(error, LocalEntryNotFoundError) and is_offline_mode()):
            return None
        raise refusal(error, repo, f"reading {name}", repo_type) from None


def has_file(reference: str | Path, name: str, revision: str | None) -> bool:
    """Return whether a folder or Hub repo has a file, without downloading it; False where the Hub cannot be asked."""
    if not _is_repo(reference):
        return (Path(reference) / name).is_file()
    try:
        return not is_offline_mode() and file_exists(str(reference), name, revision=revision)
    except hub_errors() as error:
        raise explain(error, str(reference), f"looking for {name}") from None


def _is_repo(reference: str | Path) -> bool:
    """Return whether it is the id of a repo; False for a folder, an error for the path of none."""
    if Path(reference).is_dir():
        return False
    if not on_hub(reference):
        raise FileNotFoundError(f"the reference must be a Hub repo id or a folder, {reference} does not exist.")
    return True


def refusal(error: BaseException, repo_id: str, step: str, repo_type: str) -> HubError:
    """Explain an error; a repo that is not there may be one of another type, under the same name."""
    if isinstance(error, RepositoryNotFoundError) and not isinstance(error, GatedRepoError):
        for other in _KINDS.keys() - {repo_type}:
            try:
                HfApi().repo_info(repo_id, repo_type=other)
            except hub_errors():
                continue
            what = f"it is a {_KINDS[other]}, not a {_KINDS[repo_type]}"
            return HubError(repo_id, step, what, f"Give the repo of a {_KINDS[repo_type]}", status=404)
    return explain(error, repo_id, step)


# ---- are these the bytes that the Hub has? -------------------------------------------------------------------------


class _Cached(NamedTuple):
    """A file in the cache: <folder of the repo>/snapshots/<commit>/<name>."""

    repo_id: str
    repo_type: str
    commit: str
    name: str
    path: Path
    token: str | None

    @classmethod
    def of(cls, path: Path, token: str | None) -> _Cached | None:
        """Take apart the path of a file, None if it is not in the cache of the Hub's clients."""
        match = re.search(r"/(model|dataset|space)s--([^/]+)/snapshots/([0-9a-f]{40})/(.+)$", path.as_posix())
        return cls(match[2].replace("--", "/"), match[1], match[3], match[4], path, token) if match else None

    @property
    def blob(self) -> Path | None:
        """The file that the snapshot points at, named by its hash; None in a cache without links."""
        return self.path.parent / os.readlink(self.path) if self.path.is_symlink() else None

    def expected(self) -> str | None:
        """Return the hash that the Hub names: sha256 of large files (64 digits), git's of the others (40)."""
        name = self.blob.name if self.blob is not None else self._asked()
        return name if name and re.fullmatch(r"[0-9a-f]{40}|[0-9a-f]{64}", name) else None

    def _asked(self) -> str | None:
        if is_offline_mode():
            return None
        url = hf_hub_url(self.repo_id, self.name, repo_type=self.repo_type, revision=self.commit)
        return get_hf_file_metadata(url, token=self.token).etag

    def remove(self, inode: int) -> None:
        """Take the file out of the cache, unless another process has put a new one there."""
        if not self.path.exists() or os.stat(self.path).st_ino != inode:
            return
        links = [p for p in (self.path, self.blob) if p is not None]
        target = self.path.resolve()  # of a blob that several caches share
        for each in dict.fromkeys([*links, target]):
            each.unlink(missing_ok=True)

    def again(self) -> None:
        """Download it once more."""
        hf_hub_download(self.repo_id, self.name, repo_type=self.repo_type, revision=self.commit, token=self.token)


def verify(path: Path, *, token: str | None = None) -> Path:
    """Compare a file in the Hub's cache with the hash that it was announced with, once per process; return its path.

    The clients compare sizes only. A file with other bytes is removed and downloaded once more. What is not in the
    cache, or was announced without a hash (a mirror), or has no hash while the Hub cannot be asked, is taken as it is.

    Args:
        path: As `hf_hub_download` returned it.
        token: That it was downloaded with; by default the one that `hf auth login` stored, or HF_TOKEN.

    Raises:
        HubError: If the second download has other bytes, too; then neither is kept.
    """
    cached = _Cached.of(path, token)
    if cached is None or _stamp(path) in _verified:
        return path
    step = f"verifying {cached.name}"
    try:
        wrong = _difference(cached)
        if wrong is not None:
            step = f"downloading {cached.name} again, which was damaged in the cache,"
            cached.again()
            wrong = _difference(cached)
    except hub_errors() as error:
        raise explain(error, cached.repo_id, step) from None
    if wrong is not None:
        expected, found = wrong
        raise HubError(
            cached.repo_id,
            f"verifying {cached.name}",
            f"its hash must be {expected}, got {found}, also after a second download; nothing of it was used or kept",
            "Try again later; if it stays, ask the owner of the repo to upload the file again",
        )
    _verified.add(_stamp(path))
    return path


def _difference(cached: _Cached) -> tuple[str, str] | None:
    """Return the hash that was announced and that of the bytes if they differ; the file is then removed."""
    expected = cached.expected()
    if expected is None:
        return None
    found, inode = _hash(cached.path, expected)
    if found == expected:
        return None
    cached.remove(inode)
    return expected, found


def _hash(path: Path, like: str) -> tuple[str, int]:
    """Return the hash of a file's content, of the kind of another one, and its inode."""
    with open(path, "rb") as file:
        status = os.fstat(file.fileno())
        digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % status.st_size)
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest(), status.st_ino


def _stamp(path: Path) -> tuple[str, int, int, int]:
    status = os.stat(path)
    return str(path), status.st_ino, status.st_mtime_ns, status.st_size
