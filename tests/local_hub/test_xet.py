"""Xet storage of the local Hub, with the real client."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from local_hub import DEFAULT_TOKEN, Hub
from testing.hub import served

XET_UPLOAD = """
import sys
from huggingface_hub import HfApi
api = HfApi()
repo = api.create_repo("me/xet").repo_id
print(api.upload_file(repo_id=repo, path_in_repo="one.bin", path_or_fileobj=sys.argv[1]).oid)
print(api.upload_folder(repo_id=repo, folder_path=sys.argv[2], create_pr=True).pr_revision)
"""


XET_DOWNLOAD = """
from huggingface_hub import hf_hub_download, snapshot_download
print(hf_hub_download("me/xet", "one.bin"))
print(snapshot_download("me/xet", revision="refs/pr/1"))
"""


def run_client(script: str, endpoint: str, home: Path, *args: object, xet: bool = True) -> list[str]:
    """Lines a script prints that runs with a client of its own."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_TOKEN": DEFAULT_TOKEN, "HF_HOME": str(home)}
    environment["HF_HUB_DISABLE_XET"] = "0" if xet else "1"
    command = [sys.executable, "-c", script, *map(str, args)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


@pytest.mark.slow
def test_xet_round_trip(tmp_path: Path) -> None:
    content = os.urandom(300_000) + b"compressible" * 20_000
    folder = tmp_path / "folder"
    folder.mkdir()
    (tmp_path / "one.bin").write_bytes(content)
    (folder / "two.safetensors").write_bytes(content[::-1])
    (folder / "note.txt").write_bytes(b"note")
    with Hub(tmp_path / "hub", xet=True) as hub:
        home = tmp_path / "home"
        oid, revision = run_client(XET_UPLOAD, hub.endpoint, home, tmp_path / "one.bin", folder)
        assert (len(oid), revision) == (40, "refs/pr/1")
        assert served(hub, "POST", "/cas/v1/xorbs/")
        assert not served(hub, "PUT", "/lfs/")

        hub.requests.clear()
        one, pull = run_client(XET_DOWNLOAD, hub.endpoint, tmp_path / "home 2")
        assert Path(one).read_bytes() == content
        assert Path(pull, "two.safetensors").read_bytes() == content[::-1]
        assert Path(pull, "note.txt").read_bytes() == b"note"
        assert served(hub, "GET", "/xorb/")
        assert not served(hub, "GET", "/lfs/")

        hub.requests.clear()
        one, pull = run_client(XET_DOWNLOAD, hub.endpoint, tmp_path / "home 3", xet=False)
        assert Path(one).read_bytes() == content
        assert served(hub, "GET", "/lfs/")
        assert not served(hub, "GET", "/xorb/")
