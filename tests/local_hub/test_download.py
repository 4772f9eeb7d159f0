"""Files of the local Hub: whole, in ranges, by signed links."""

from pathlib import Path

import pytest
import torch
from huggingface_hub import (
    HfApi,
    snapshot_download,
)
from huggingface_hub.utils import build_hf_headers, get_session
from safetensors.torch import save_file

from local_hub import Fault, Hub
from testing.hub import WEIGHTS, once, read, served, upload
from testing.releases import since


def test_small_and_lfs_files_come_back_as_sent(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    (tmp_path / "sub dir").mkdir()
    (tmp_path / "sub dir" / "ünï 100%#?.txt").write_bytes(b"text")
    (tmp_path / "model.safetensors").write_bytes(WEIGHTS)
    api.upload_folder(repo_id=repo, folder_path=tmp_path)

    assert read(repo, "sub dir/ünï 100%#?.txt") == b"text"
    assert read(repo, "model.safetensors") == WEIGHTS
    folder = Path(snapshot_download(repo, local_dir=tmp_path / "copy"))
    assert (folder / "model.safetensors").read_bytes() == WEIGHTS
    by_path = {entry.path: entry for entry in api.list_repo_tree(repo, recursive=True)}
    assert by_path["model.safetensors"].lfs.size == len(WEIGHTS)
    assert by_path["sub dir/ünï 100%#?.txt"].lfs is None
    assert set(by_path) == {".gitattributes", "model.safetensors", "sub dir", "sub dir/ünï 100%#?.txt"}
    assert len(served(hub, "PUT", "/lfs/")) == 1


def test_resolve_tells_etag_commit_and_size(api: HfApi, repo: str) -> None:
    upload(api, repo, "config.json", b"{}")
    commit = upload(api, repo, "model.bin", WEIGHTS)
    small = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/config.json")
    large = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/model.bin")
    blobs = {file.rfilename: file for file in api.model_info(repo, files_metadata=True).siblings}

    assert (small.commit_hash, small.size, small.etag) == (commit, 2, blobs["config.json"].blob_id)
    assert (large.commit_hash, large.size, large.etag) == (
        commit,
        len(WEIGHTS),
        blobs["model.bin"].lfs.sha256,
    )
    assert large.location.startswith("http://localhost:")  # another host: storage, not a renamed repository
    assert small.xet_file_data is large.xet_file_data is None


@pytest.mark.parametrize("path", ["small.txt", "large.bin"])
@pytest.mark.parametrize(
    ("header", "part"),
    [("bytes=0-9", slice(10)), ("bytes=100-", slice(100, None)), ("bytes=-7", slice(-7, None))],
)
def test_ranges(hub: Hub, api: HfApi, path: str, header: str, part: slice) -> None:
    repo = api.create_repo("me/ranges", exist_ok=True).repo_id
    upload(api, repo, path, WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/{path}"
    hub.requests.clear()
    answer = get_session().get(url, headers={**build_hf_headers(), "Range": header})
    assert (answer.status_code, answer.content) == (206, WEIGHTS[part])
    assert answer.headers["Content-Range"].endswith(f"/{len(WEIGHTS)}")
    assert sum(record.bytes for record in hub.requests) == len(WEIGHTS[part])

    outside = get_session().get(url, headers={**build_hf_headers(), "Range": f"bytes={len(WEIGHTS)}-"})
    assert (outside.status_code, outside.headers["Content-Range"]) == (416, f"bytes */{len(WEIGHTS)}")
    changed = get_session().get(url, headers={**build_hf_headers(), "Range": header, "If-Range": '"old"'})
    assert (changed.status_code, changed.content) == (200, WEIGHTS)


def test_storage_links_must_be_signed(api: HfApi, repo: str) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    link = api.get_hf_file_metadata(url=f"{api.endpoint}/{repo}/resolve/main/model.bin").location
    assert get_session().get(link).content == WEIGHTS
    assert get_session().get(link[:-1] + "x").status_code == 403
    assert get_session().put(link, content=WEIGHTS).status_code == 403


def test_safetensors_metadata_reads_the_header_only(hub: Hub, api: HfApi, repo: str, tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(500, 200)}, weights)  # 400 kB
    api.upload_file(repo_id=repo, path_in_repo=weights.name, path_or_fileobj=weights)
    hub.requests.clear()
    metadata = api.get_safetensors_metadata(repo)
    assert metadata.parameter_count == {"F32": 100_000}
    assert sum(record.bytes for record in served(hub, "GET", "/lfs/")) == 100_001


@since("huggingface_hub", "2.2", "it does not resume within a call")
def test_truncated_download_is_resumed(
    hub: Hub, api: HfApi, repo: str, no_waiting: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # keep what came before the cut
    hub.fault = once(Fault(truncate=True), "GET", "/lfs/")
    assert read(repo, "model.bin") == WEIGHTS
    first, second = served(hub, "GET", "/lfs/")
    assert (first.status, first.bytes) == (200, len(WEIGHTS) // 2)
    assert (second.status, second.range) == (206, f"bytes={len(WEIGHTS) // 2}-")


@pytest.mark.parametrize(
    ("fault", "status", "part"),
    [(Fault(ignore_range=True), 200, slice(None)), (Fault(shift_range=5), 206, slice(15, 25))],
)
def test_wrong_range(hub: Hub, api: HfApi, fault: Fault, status: int, part: slice) -> None:
    repo = api.create_repo("me/wrong-range", exist_ok=True).repo_id
    upload(api, repo, "small.txt", WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/small.txt"
    hub.fault = once(fault, "GET", "/resolve/")
    wrong, right = (get_session().get(url, headers={"Range": "bytes=10-19"}) for _ in range(2))
    assert (wrong.status_code, wrong.content) == (status, WEIGHTS[part])
    assert (right.status_code, right.content) == (206, WEIGHTS[10:20])


def test_changed_etag_and_delay(hub: Hub, api: HfApi, repo: str, no_waiting: list[float]) -> None:
    upload(api, repo, "model.bin", WEIGHTS)
    url = f"{api.endpoint}/{repo}/resolve/main/model.bin"
    hub.fault = once(Fault(etag="other", delay=3), "HEAD", "/resolve/")
    assert api.get_hf_file_metadata(url=url).etag == "other"
    assert 3 in no_waiting
    assert api.get_hf_file_metadata(url=url).etag != "other"
