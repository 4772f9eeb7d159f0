"""What is said about a name that leads nowhere, and what to type instead."""

from __future__ import annotations

from pathlib import Path

import pytest

from not_hf import (
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    average_donors,
    check_compatibility,
    import_checkpoint,
    load_text,
)
from testing.commands import failed, is_one_line
from testing.models import tiny_model

T = TransplantedForCausalLM.from_pretrained


def donors(name: str):
    """Whatever reads a donor."""
    base = tiny_model("llama")
    yield lambda: DonorModel.from_pretrained(name)
    yield lambda: T(base, name)
    yield lambda: T(name)
    yield lambda: T(base, DonorModel.from_base(base, (1, 3))).load_donor(name, "b")
    yield lambda: check_compatibility(name, base)


def bases(name: str):
    """Whatever reads a base."""
    yield lambda: DonorModel.from_base(name, (1, 3))
    yield lambda: T(name, DonorModel.from_base(tiny_model("llama"), (1, 3)))
    yield lambda: check_compatibility(DonorModel.from_base(tiny_model("llama"), (1, 3)), name)


@pytest.mark.parametrize("readers", [donors, bases])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("runs/kjv/organ", "there is no such folder, runs/kjv/organ, and it is not a Hub ID"),
        ("./organ", r"there is no such folder, \./organ, and it is not a Hub ID"),
        ("missing.pt", r"there is no file missing\.pt"),
        ("./runs/kjv/missing.pt", r"there is no file \./runs/kjv/missing\.pt"),
        (
            "file.pt",
            r"file\.pt is a file, where a folder or Hub ID is expected; .*import_checkpoint or `not-hf import`",
        ),
    ],
)
def test_a_path_that_leads_nowhere_is_called_one(name, message, readers, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file.pt").write_bytes(b"PK\3\4")
    for read in readers(name):
        with pytest.raises(OSError, match=message) as raised:
            read()
        assert is_one_line(raised.value)


def test_a_file_to_import_that_is_not_there(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"there is no file .*gone\.pt"):
        import_checkpoint(tmp_path / "gone.pt", tmp_path)


def test_a_base_in_the_place_of_the_donor():
    base, donor = tiny_model("llama"), DonorModel.from_base(tiny_model("llama"), (1, 3))
    model = T(tiny_model("llama"), donor)
    for call in (lambda: T(base, tiny_model("llama")), lambda: model.load_donor(base, "a")):
        with pytest.raises(NotHFError, match="the donor is a LlamaForCausalLM, not a DonorModel; name the base first"):
            call()
    for given in ((donor, base), (donor, donor), (donor,)):
        with pytest.raises(NotHFError, match="is a DonorModel, not a recipient; name the base first, then the donor"):
            T(*given)


@pytest.mark.parametrize("readers", [donors, bases])
def test_a_mistyped_id_is_named_offline(readers, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for read in readers("me/mistyped"):
        with pytest.raises(
            OSError, match=r"no such folder, me/mistyped, no repo of that name in the cache.*correct the"
        ):
            read()


def test_a_push_without_a_valid_token_says_what_to_type(monkeypatch, tmp_path):
    donor = DonorModel.from_base(tiny_model("llama"), (1, 3))
    donor.save_pretrained(tmp_path)
    for token in (False, "hf_unknown"):
        with pytest.raises(
            PermissionError, match=r"me/unwritten cannot be pushed without a valid token .401.: .*hf auth login"
        ):
            donor.push_to_hub("me/unwritten", token=token)
    assert "hf auth login" in failed("push", tmp_path, "me/unwritten", "--token", "hf_unknown")


def test_text_that_is_none_is_said_so(tmp_path, base_folder):
    (tmp_path / "empty.txt").touch()
    with pytest.raises(NotHFError, match=r"empty\.txt is empty; give a file that holds text"):
        load_text(tmp_path / "empty.txt")
    (tmp_path / "text.txt").write_text("words\n")
    with pytest.raises(NotHFError, match=r"a stream has no slices, got split 'train\[:50%\]'"):
        load_text(tmp_path / "text.txt", split="train[:50%]", streaming=True)
    assert "the prompt is empty; give a text" in failed("generate", base_folder("llama"), "")


def test_one_donor_is_no_list_of_donors():
    with pytest.raises(NotHFError, match=r"needs a list of two or more donors, got 'me/gpt2-kjv'; give it: \[a, b\]"):
        average_donors("me/gpt2-kjv")
