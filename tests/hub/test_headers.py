"""Headers of safetensors files are believed only where they hold together."""

from __future__ import annotations

import re

import pytest
from huggingface_hub import HfApi
from safetensors import SafetensorError
from safetensors.torch import load_file

from not_hf import (
    CorruptDonorError,
)
from not_hf.hub.partial_download import list_tensors
from testing.commands import is_one_line
from testing.cuts import cut
from testing.models import tiny_model

pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.parametrize(
    "content",
    [b"", b"\0" * 64, b"\xff" * 64, (9).to_bytes(8, "little") + b'{"a":[]}}' + b"\0" * 9, b"<html>" * 20],
    ids=["empty", "zeros", "too long", "no tensors", "a page"],
)
def test_a_file_that_is_no_safetensors_is_refused(content, hub, model, tmp_path):
    model.config.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(content)
    repo = HfApi().create_repo("me/garbage", exist_ok=True).repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(CorruptDonorError) as raised:
        cut(repo)
    assert is_one_line(raised.value)


def test_a_header_that_contradicts_itself_is_refused_and_not_kept(hub, model, tmp_path, cache):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole.replace(b'"shape":[512,256]', b'"shape":[512,255]', 20))
    repo = HfApi().create_repo("me/contradiction").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path)
    with pytest.raises(CorruptDonorError, match="not a whole safetensors file"):
        cut(repo)
    assert not list(cache.rglob("*.safetensors"))


@pytest.mark.parametrize(
    "change",
    [
        lambda header: header.replace(b'"shape":[48,32]', b'"shape":[24,32]'),
        lambda header: header.replace(b'"shape":[48,32]', b'"shape":["a",25]'),
        lambda header: header.replace(b'"shape":[48,32]', b'"shape":[-48,-2]'),
        lambda header: header.replace(b'"dtype":"F32"', b'"dtype":"F99"', 1),
        lambda header: header.replace(b'"dtype":"F32"', b'"dtype":["F"]', 1),
        lambda header: header.replace(b"layers.4.input_layernorm", b"layers.3.input_layernorm"),
        lambda header: re.sub(rb"offsets\":\[(\d)", lambda found: b'offsets":[9', header, count=3),
        lambda header: re.sub(rb"(offsets\":\[)\d+,\d", rb"\g<1>0,1e99", header, count=1),
        lambda header: header.replace(b'"format":"pt"', b'"format":[]'),
        lambda header: header.replace(b'{"format":"pt"}', b"[]"),
        lambda header: header.replace(b'"dtype":', b'"x":NaN,"dtype":', 1),
        lambda header: header.decode().encode("utf-16-le"),
        lambda header: header.replace(b'"format":"pt"', b'"format":"\\ud800"'),
        lambda header: header.replace(b'"dtype":', b'"x":' + b"[" * 200 + b"]" * 200 + b',"dtype":', 1),
    ],
    ids=[
        *("length", "words", "negative", "dtype", "list", "twins", "overlap", "infinite"),
        *("metadata", "no metadata", "not a number", "utf-16", "half a character"),
        "nested",
    ],
)
@pytest.mark.parametrize("place", ["folder", "repo"])
def test_headers_that_safetensors_refuses_are_refused(change, place, tmp_path):
    tiny_model("llama", num_hidden_layers=8).save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    whole = file.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    header = change(whole[8 : 8 + size])
    assert header != whole[8 : 8 + size]
    file.write_bytes(len(header).to_bytes(8, "little") + header + whole[8 + size :])
    with pytest.raises(SafetensorError):
        load_file(file)
    where = str(tmp_path)
    if place == "repo":
        where = HfApi().create_repo("me/odd-header", exist_ok=True).repo_id
        HfApi().upload_folder(repo_id=where, folder_path=tmp_path)
    for attempt in (lambda: cut(where), lambda: list_tensors(where)):
        with pytest.raises(CorruptDonorError, match="not a whole safetensors file") as raised:
            attempt()
        assert is_one_line(raised.value)
