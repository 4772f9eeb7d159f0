"""Endpoints of Xet storage, as the real `hf_xet` client uses them: tokens, and a content-addressed store.

A commit names a file that came in by Xet by its sha256 alone. The link to Xet's own hash is in the shard
that `hf_xet` uploads before: each file's recipe carries the sha256 the client computed. So the server learns
it from the store, and a commit can refuse a sha256 that no shard has named.

A folder as store (`local://` for `casUrl`) works too, but `hf_xet` locks it for as long as the process
lives: no second process, and no server, could read what a first one wrote.
"""

import tempfile
import time
from pathlib import Path

from .site import Site
from .wire import HubError, Request, Response, file_response, json_response, parse_range

INTERNAL = "x-hub-internal"  # header of the server's own requests, which no test wants to count
_LIFETIME = 3600  # seconds


def read_token(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Let the asker read from the store."""
    site.commit(site.downloadable(request, kind, repo), revision)
    return _token(site, "read")


def write_token(site: Site, request: Request, kind: str, repo: str, revision: str) -> Response:
    """Let the asker write to the store, if they may commit."""
    site.target(request, kind, repo, revision)
    return _token(site, "write")


def not_offered(site: Site, request: Request, **_: str) -> Response:
    """Parts of the protocol that `hf_xet` tries first and can do without: deduplication, version 2."""
    raise HubError(404, "NotOffered", f"this Hub does not offer {request.path}")


def post_xorb(site: Site, request: Request, xet_hash: str) -> Response:
    """Take in packed chunks."""
    _check(site, request, "write")
    site.xorbs.add_xorb(xet_hash, request.body)
    return json_response({"was_inserted": True})


def post_shard(site: Site, request: Request) -> Response:
    """Take in the recipes of files."""
    _check(site, request, "write")
    site.xorbs.add_shard(request.body)
    return json_response({"result": 1})


def get_reconstruction(site: Site, request: Request, xet_hash: str) -> Response:
    """How to put a file, or the range asked for, together."""
    _check(site, request, "read", "write")
    try:
        size = sum(term.length for term in site.xorbs.terms(xet_hash))
    except FileNotFoundError:
        raise HubError(404, "FileNotFound", f"no file {xet_hash} in Xet storage") from None
    offset, length = parse_range(request.headers.get("range", ""), size) or (0, size)
    return json_response(site.xorbs.reconstruction(xet_hash, offset, length, f"{site.storage}/xorb"))


def get_xorb(site: Site, request: Request, xet_hash: str) -> Response:
    """Packed chunks; `hf_xet` asks for the range that the reconstruction named."""
    return file_response(request, site.xorbs.xorb(xet_hash), xet_hash)


def restore(site: Site, sha256: str) -> None:
    """Put a file together that came in by Xet, for a client that asks without Xet.

    Done by `hf_xet` itself, reading from this very server: packed chunks may be compressed.
    """
    import hf_xet  # optional: only a Hub with Xet storage needs it

    pass_ = _token(site, "read").headers
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, sha256)
        with hf_xet.XetSession().new_file_download_group(
            endpoint=pass_["X-Xet-Cas-Url"],
            token=pass_["X-Xet-Access-Token"],
            token_expiry_unix_secs=int(pass_["X-Xet-Token-Expiration"]),
            custom_headers={INTERNAL: "1"},
        ) as group:
            wanted = hf_xet.XetFileInfo(site.xorbs.file_hash(sha256), site.xorbs.size(sha256))
            group.start_download_file(wanted, str(target))
        if site.store.add_lfs(target.read_bytes()) != sha256:
            raise HubError(500, "BadDigest", f"the Xet file uploaded as {sha256} has other content")


def _token(site: Site, scope: str) -> Response:
    """A store's address and pass, both as JSON, for `hf_xet`, and as headers, for `huggingface_hub`."""
    address, token = f"{site.endpoint}/cas", f"{scope}.{site.sign(scope)}"
    expiry = int(time.time()) + _LIFETIME
    headers = {
        "X-Xet-Cas-Url": address,
        "X-Xet-Access-Token": token,
        "X-Xet-Token-Expiration": str(expiry),
    }
    return json_response({"casUrl": address, "accessToken": token, "exp": expiry}, headers=headers)


def _check(site: Site, request: Request, *scopes: str) -> None:
    if request.bearer not in {f"{scope}.{site.sign(scope)}" for scope in scopes}:
        raise HubError(401, "Unauthorized", f"a token to {' or '.join(scopes)} is needed")
