"""Files written tensor by tensor are those that safetensors writes."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import save_file

from not_hf import CorruptDonorError
from not_hf.hub.checkpoint import CHUNK, DTYPES, hollow, open_file, torch_dtype
from not_hf.hub.tensor_file import write_tensors


def test_a_file_is_that_of_safetensors_bit_for_bit(tmp_path):
    tensors = {f"b.{name}": torch.ones(3, 5).to(torch_dtype(name)) for name in DTYPES}
    tensors |= {'quoted "ä" \\': torch.randn(2, 3), "number": torch.tensor(1.5), "empty": torch.empty(0, 4)}
    tensors["large"] = torch.randn(CHUNK // 4 + 3)
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    views, counts = open_file(str(tmp_path / "theirs")), []
    write_tensors(tmp_path / "ours", hollow(views), lambda name: views[name].chunks(), counts.append)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert max(counts) == CHUNK and sum(counts) == sum(tensor.nbytes for tensor in tensors.values())


@pytest.mark.parametrize("length", [3, 5])
def test_a_tensor_of_another_length_is_refused(length, tmp_path):
    tensors = {"a": torch.empty(4, device="meta")}
    with pytest.raises(CorruptDonorError, match=rf"a has {4 * length} bytes, expected 16"):
        write_tensors(tmp_path / "ours", tensors, lambda name: [torch.ones(length)], lambda size: None)


def test_a_file_that_changes_while_it_is_read_is_refused(tmp_path):
    save_file({"a": torch.ones(CHUNK // 2)}, tmp_path / "file")
    view = open_file(str(tmp_path / "file"))["a"]
    chunks = view.chunks()
    assert torch.equal(next(chunks), torch.ones(CHUNK // 4))
    save_file({"a": torch.zeros(CHUNK // 2)}, tmp_path / "file")
    with pytest.raises(CorruptDonorError, match="was written to while it was read"):
        list(chunks)
