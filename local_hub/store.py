"""Repositories on disk: content by its hash, one JSON file per repository, swapped whole on every change."""

import hashlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

GIT_ATTRIBUTES = b"".join(
    b"*.%s filter=lfs diff=lfs merge=lfs -text\n" % extension
    for extension in (b"bin", b"parquet", b"pt", b"safetensors")
)


@dataclass(frozen=True)
class File:
    """One file of a commit: its git blob id and size in bytes; `sha256` when its content is kept by LFS."""

    oid: str
    size: int
    sha256: str | None = None

    @property
    def key(self) -> str:
        """The content's name in the store, its ETag, and what the client compares to skip unchanged files."""
        return self.sha256 or self.oid


@dataclass(frozen=True)
class Commit:
    """One commit with its full listing, path to file."""

    sha: str
    parent: str | None
    title: str
    message: str
    author: str
    date: str
    files: dict[str, File]


@dataclass(frozen=True)
class Pull:
    """A pull request; its commits live on `refs/pr/{num}`."""

    num: int
    title: str
    description: str
    author: str
    date: str
    base: str


@dataclass(frozen=True)
class Repo:
    """One repository at one moment; replaced, never changed: a change that fails leaves no trace."""

    kind: str  # "model" or "dataset"
    id: str
    created: str
    private: bool = False
    gated: str | bool = False  # False, "auto" or "manual"
    allowed: list[str] = field(default_factory=list)  # users let through the gate
    downloads: int = 0  # in the last 30 days; nothing counts them here
    likes: int = 0
    refs: dict[str, str] = field(default_factory=dict)  # "refs/heads/main" -> commit sha
    commits: dict[str, Commit] = field(default_factory=dict)
    pulls: list[Pull] = field(default_factory=list)

    @property
    def owner(self) -> str:
        """User whose namespace holds the repository."""
        return self.id.split("/")[0]

    @property
    def prefix(self) -> str:
        """What stands before the id in web addresses."""
        return "datasets/" if self.kind == "dataset" else ""

    @property
    def api(self) -> str:
        """The repository's path below the endpoint of the JSON API."""
        return f"/api/{self.kind}s/{self.id}"

    def find_ref(self, revision: str) -> str | None:
        """Full name of a branch, a tag or a pull request."""
        names = (revision, f"refs/heads/{revision}", f"refs/tags/{revision}")
        return next((name for name in names if name in self.refs), None)

    def find_commit(self, revision: str) -> Commit | None:
        """The commit a branch, tag, `refs/pr/N` or full hash stands for. As on the Hub, no short hashes."""
        ref = self.find_ref(revision)
        return self.commits.get(self.refs[ref] if ref else revision)

    def history(self, commit: Commit) -> Iterator[Commit]:
        """The commit and its ancestors, newest first."""
        current: Commit | None = commit
        while current is not None:
            yield current
            current = self.commits[current.parent] if current.parent else None

    def is_pull_of(self, user: str, revision: str) -> bool:
        """Whether the revision is a pull request that the user opened."""
        return any(revision == f"refs/pr/{pull.num}" and pull.author == user for pull in self.pulls)

    def with_ref(self, ref: str, sha: str) -> "Repo":
        """The repository with one ref created or moved."""
        return replace(self, refs={**self.refs, ref: sha})

    def without_ref(self, ref: str) -> "Repo":
        """The repository with one ref deleted; its commits stay reachable by hash."""
        return replace(self, refs={name: sha for name, sha in self.refs.items() if name != ref})

    def with_commit(self, ref: str, commit: Commit) -> "Repo":
        """The repository with a commit on top of one ref."""
        return replace(self, commits={**self.commits, commit.sha: commit}).with_ref(ref, commit.sha)

    @classmethod
    def from_json(cls, value: dict) -> "Repo":
        """The inverse of `dataclasses.asdict`."""
        commits = {
            sha: Commit(**{**commit, "files": {path: File(**file) for path, file in commit["files"].items()}})
            for sha, commit in value["commits"].items()
        }
        return cls(**{**value, "commits": commits, "pulls": [Pull(**pull) for pull in value["pulls"]]})


def now() -> str:
    """The time as the client parses it."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def git_oid(content: bytes) -> str:
    """Git's name for a blob, the one the client computes to see whether a file changed."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def lfs_file(sha256: str, size: int) -> File:
    """A file whose content LFS keeps; git itself holds only this pointer."""
    return File(git_oid(lfs_pointer(sha256, size)), size, sha256)


def lfs_pointer(sha256: str, size: int) -> bytes:
    """What git stores in place of an LFS file."""
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def make_commit(parent: Commit | None, title: str, message: str, author: str, files: dict[str, File]) -> Commit:
    """A commit with a hash of its own, even when nothing but the time differs."""
    above = parent.sha if parent else None
    sha = hashlib.sha1(f"{above} {time.time_ns()} {title}".encode()).hexdigest()
    return Commit(sha, above, title, message, author, now(), files)


def write_atomically(path: Path, content: bytes) -> None:
    """Put a file in place at once: a reader sees the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{uuid.uuid4().hex}")
    draft.write_bytes(content)
    os.replace(draft, path)


class Store:
    """All content and repositories below one folder; read again when the server restarts."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self._lock = threading.RLock()
        found = (Repo.from_json(json.loads(path.read_bytes())) for path in (root / "repos").glob("*.json"))
        self._repos = {(repo.kind, repo.id): repo for repo in found}

    def content(self, key: str) -> Path:
        """Where the content of that name lies, or would."""
        return self._root / "objects" / key[:2] / key

    def add(self, content: bytes) -> File:
        """Keep the content of a small file in git."""
        file = File(git_oid(content), len(content))
        write_atomically(self.content(file.oid), content)
        return file

    def add_lfs(self, content: bytes) -> str:
        """Keep the content of a large file; returns its sha256."""
        sha256 = hashlib.sha256(content).hexdigest()
        write_atomically(self.content(sha256), content)
        return sha256

    def find(self, kind: str, repo_id: str) -> Repo | None:
        """The repository, or None."""
        return self._repos.get((kind, repo_id))

    def all(self, kind: str) -> list[Repo]:
        """Every repository of one kind."""
        with self._lock:
            return [repo for repo in self._repos.values() if repo.kind == kind]

    def create(self, repo: Repo) -> bool:
        """Keep a new repository; False when there is one already."""
        with self._lock:
            if self.find(repo.kind, repo.id):
                return False
            self._save(repo)
            return True

    def change(self, repo: Repo, change: Callable[[Repo], Repo]) -> Repo:
        """Apply `change` to the repository as it now is and keep the outcome; keep nothing if it raises."""
        with self._lock:
            changed = change(self._repos[repo.kind, repo.id])
            self._save(changed)
            return changed

    def delete(self, repo: Repo) -> None:
        """Forget a repository. Content stays: another one may share it."""
        with self._lock:
            del self._repos[repo.kind, repo.id]
            self._state(repo).unlink()

    def _save(self, repo: Repo) -> None:
        write_atomically(self._state(repo), json.dumps(asdict(repo)).encode())
        self._repos[repo.kind, repo.id] = repo

    def _state(self, repo: Repo) -> Path:
        return self._root / "repos" / f"{quote(f'{repo.kind}s/{repo.id}', safe='')}.json"
