"""Pickles are read as data: what would run code, or is no set of tensors, is refused in one line."""

from __future__ import annotations

import os
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from not_hf import (
    CorruptDonorError,
    import_checkpoint,
)
from not_hf.architecture.stack import find_stack
from not_hf.donor import pickles
from testing.commands import invoke, is_one_line
from testing.pickles import (
    FIRST,
    LAST,
    SPAN,
    flat,
    layers_of,
    save,
    trained,
)

EVIDENCE = "executed"  # a folder that the hostile pickles would make


def test_a_small_file_that_unfolds_into_a_large_one_is_refused(base_folder, tmp_path, monkeypatch):
    content: list = layers_of("llama")
    for _ in range(9):
        content = [content, content]
    file = save(content, tmp_path)
    monkeypatch.setattr(pickles, "MAX_ENTRIES", 2**9)
    with pytest.raises(CorruptDonorError, match="nested too deep"):
        import_checkpoint(file, base_folder("llama"), SPAN)


class Hostile:
    """Makes a folder when it is unpickled."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __reduce__(self):
        return os.makedirs, (str(self.folder),)


def pickled(content: object, file: Path, protocol: int) -> None:
    file.write_bytes(pickle.dumps(content, protocol=protocol))


HOSTILE: dict[str, tuple[Callable[[object, Path], None], str]] = {  # ways to write it; the reason it is refused for
    "torch.save": (lambda content, file: torch.save(content, file), r"would run os\.makedirs"),
    "torch.save, old format": (
        lambda content, file: torch.save(content, file, _use_new_zipfile_serialization=False),
        r"GLOBAL os\.makedirs",
    ),
    "pickle, protocol 2": (lambda content, file: pickled(content, file, 2), r"GLOBAL os\.makedirs"),
    "pickle": (lambda content, file: pickled(content, file, pickle.DEFAULT_PROTOCOL), "written by pickle"),
    "pickle, latest": (lambda content, file: pickled(content, file, pickle.HIGHEST_PROTOCOL), "written by pickle"),
}


@pytest.mark.parametrize("way", HOSTILE)
def test_a_pickle_that_would_run_code_is_refused_with_the_reason(way, base_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # what others have set for other files
    file = tmp_path / "donor_layers.pt"
    write, reason = HOSTILE[way]
    write({"extra": Hostile(tmp_path / EVIDENCE), "layers": layers_of("llama")}, file)
    with pytest.raises(CorruptDonorError, match=rf"{reason}.*not_hf loads tensors only") as raised:
        import_checkpoint(file, base_folder("llama"), SPAN)
    assert is_one_line(raised.value)
    result = invoke("import", file, base_folder("llama"), "--layers", "1:3", "-o", tmp_path / "out")
    assert (result.exit_code, result.stdout) == (1, "") and re.search(reason, result.stderr.splitlines()[-1])
    assert not (tmp_path / EVIDENCE).exists() and not (tmp_path / "out").exists()
    if way == "torch.save":
        torch.load(file, weights_only=False)  # the evidence is what running it leaves
        assert (tmp_path / EVIDENCE).exists()


def test_modules_are_refused_by_name(base_folder, tmp_path):
    file = save(find_stack(trained("llama")).layers[FIRST:LAST], tmp_path)
    with pytest.raises(CorruptDonorError, match=r"torch\.nn\.modules\.container\.ModuleList.*state_dict\(\)"):
        import_checkpoint(file, base_folder("llama"), SPAN)


def truncated(file: Path, **options) -> None:
    sound = save(layers_of("llama"), file.parent, **options).read_bytes()
    file.write_bytes(sound[: len(sound) // 2])


NO_CHECKPOINT = {
    "truncated": (truncated, "cannot be read"),
    "truncated, old format": (lambda file: truncated(file, _use_new_zipfile_serialization=False), "cannot be read"),
    "empty": (lambda file: file.write_bytes(b""), "cannot be read"),
    "text": (lambda file: file.write_text("version https://git-lfs.github.com/spec/v1\n"), "cannot be read"),
    "zeros": (lambda file: file.write_bytes(bytes(99)), "cannot be read"),
    "a zip of something": (lambda file: file.write_bytes(b"PK\x03\x04" + bytes(99)), "cannot be read"),
    "safetensors": (lambda file: save_file(flat(layers_of("llama"), ""), file), "is a safetensors file"),
    "data of pickle itself": (lambda file: pickled([1, 2], file, 5), "written by pickle, not by torch.save"),
}


@pytest.mark.parametrize("case", NO_CHECKPOINT)
def test_what_is_no_checkpoint_is_refused(case, base_folder, tmp_path):
    make, message = NO_CHECKPOINT[case]
    make(tmp_path / "donor_layers.pt")
    with pytest.raises(CorruptDonorError, match=message) as raised:
        import_checkpoint(tmp_path, base_folder("llama"), SPAN)
    assert is_one_line(raised.value) and str(tmp_path / "donor_layers.pt") in str(raised.value)
    assert "weights_only" not in str(raised.value)


def test_a_compressed_file_is_refused_before_it_is_inflated(base_folder, tmp_path, monkeypatch):
    sound = save(layers_of("llama"), tmp_path)
    file = tmp_path / "small.pt"
    with zipfile.ZipFile(sound) as whole, zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as deflated:
        for entry in whole.namelist():
            padding = bytes(2**24) if entry.endswith("data.pkl") else b""
            deflated.writestr(entry, whole.read(entry) + padding)
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CorruptDonorError, match=r"small\.pt is compressed, which torch\.save never does"):
        import_checkpoint(file, base_folder("llama"), SPAN)


def test_an_archive_that_cannot_be_listed_is_not_given_to_torch(base_folder, tmp_path, monkeypatch):
    file = save(layers_of("llama"), tmp_path)
    file.write_bytes(file.read_bytes()[:-200])
    monkeypatch.setattr(torch, "load", None)
    with pytest.raises(CorruptDonorError, match=r"cannot be read as tensors of torch\.save"):
        import_checkpoint(file, base_folder("llama"), SPAN)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused(base_folder, tmp_path):
    content = {"layers": layers_of("llama"), "lengths": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])}
    with pytest.raises(CorruptDonorError, match=r"holds a nested tensor, lengths; torch\.save dense"):
        import_checkpoint(save(content, tmp_path), base_folder("llama"), SPAN)


def test_one_tensor_under_many_names_is_refused_before_it_is_copied(base_folder, tmp_path, monkeypatch):
    layers = layers_of("llama")
    large = torch.ones(2**16)
    layers[0] |= {f"mlp.{n}": large for n in range(100)}
    monkeypatch.setattr(torch.Tensor, "clone", None)
    with pytest.raises(CorruptDonorError, match="refers to its values many times: 6,5"):
        import_checkpoint(save(layers, tmp_path), base_folder("llama"), SPAN)


@pytest.mark.parametrize(
    "key", [(1, 2), 1.5, None, "k" * 5000, 2**80], ids=["tuple", "float", "none", "long", "large"]
)
def test_what_has_no_name_is_left_out(key, base_folder, tmp_path):
    content = {"layers": layers_of("llama"), key: {"self_attn.q_proj.weight": torch.ones(2)}}
    assert import_checkpoint(save(content, tmp_path), base_folder("llama"), SPAN).config.layers == [1, 3]
