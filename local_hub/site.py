"""What every endpoint shares: where the Hub lives, what it keeps, who asks and what they may do."""

import hashlib
import hmac
from dataclasses import dataclass

from .store import Commit, File, Repo, Store
from .wire import HubError, Request
from .xorbs import Xorbs


@dataclass(frozen=True)
class Site:
    """One running Hub as its endpoints see it.

    `storage` names the same server by another host name. The client takes a redirect within one host for a
    renamed repository and follows it; only another host is a storage server, whose answer it treats as LFS
    content and to which it sends no token.
    """

    endpoint: str  # http://127.0.0.1:PORT
    storage: str  # http://localhost:PORT
    store: Store
    users: dict[str, str]  # token -> name
    secret: bytes
    xorbs: Xorbs
    has_xet: bool

    def sign(self, text: str) -> str:
        """A signature only this server can make, for links and tokens that need no login."""
        return hmac.new(self.secret, text.encode(), hashlib.sha256).hexdigest()

    def viewer(self, request: Request) -> str | None:
        """Who asks; None without a token.

        Raises:
            HubError: 401, the token is nobody's.
        """
        if request.bearer is None:
            return None
        if request.bearer not in self.users:
            raise HubError(401, "Unauthorized", "Invalid credentials in Authorization header")
        return self.users[request.bearer]

    def login(self, request: Request) -> str:
        """Who asks; an error without a token."""
        if (viewer := self.viewer(request)) is None:
            raise HubError(401, "Unauthorized", "Invalid username or password.")
        return viewer

    def readable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """A repository the asker may see. A private one looks like none at all to everybody else."""
        viewer = self.viewer(request)
        repo = self.store.find(kind, repo_id)
        if repo is None or not can_see(repo, viewer):
            if viewer is None:
                raise HubError(401, "RepoNotFound", "Invalid username or password.")
            raise HubError(404, "RepoNotFound", "Repository not found")
        return repo

    def downloadable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """A repository whose files the asker may read: a gated one shows all its listing, few its files."""
        repo = self.readable(request, kind, repo_id)
        viewer = self.viewer(request)
        if not repo.gated or viewer in (repo.owner, *repo.allowed):
            return repo
        if viewer is None:
            message = f"Access to {kind} {repo_id} is restricted. Please log in."
            raise HubError(401, "GatedRepo", message)
        message = f"Access to {kind} {repo_id} is restricted and you are not in the authorized list."
        raise HubError(403, "GatedRepo", message)

    def writable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """A repository the asker may change."""
        repo = self.readable(request, kind, repo_id)
        if self.login(request) != repo.owner:
            raise HubError(403, "Forbidden", f"You don't have write access to {kind} {repo_id}")
        return repo

    def proposable(self, request: Request, kind: str, repo_id: str) -> Repo:
        """A repository the asker may open a pull request on: anyone logged in who sees it."""
        self.login(request)
        return self.readable(request, kind, repo_id)

    def target(self, request: Request, kind: str, repo_id: str, revision: str) -> Repo:
        """A repository the asker may commit to at that revision: theirs, or their pull request on it."""
        repo, viewer = self.proposable(request, kind, repo_id), self.login(request)
        if request.flag("create_pr") or repo.is_pull_of(viewer, revision):
            return repo
        return self.writable(request, kind, repo_id)

    def commit(self, repo: Repo, revision: str) -> Commit:
        """The commit behind a revision, or the client's `RevisionNotFoundError`."""
        if (commit := repo.find_commit(revision)) is None:
            raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    def file(self, commit: Commit, path: str) -> File:
        """One file of a commit, or the client's `EntryNotFoundError`, which it remembers for this commit."""
        if path not in commit.files:
            raise HubError(404, "EntryNotFound", "Entry not found", {"X-Repo-Commit": commit.sha})
        return commit.files[path]

    def text(self, commit: Commit, path: str) -> str:
        """A small text file of a commit, empty where there is none."""
        file = commit.files.get(path)
        return self.store.content(file.key).read_text("utf-8", errors="replace") if file and not file.sha256 else ""


def can_see(repo: Repo, viewer: str | None) -> bool:
    """Whether a user may know that the repository exists."""
    return not repo.private or viewer == repo.owner
