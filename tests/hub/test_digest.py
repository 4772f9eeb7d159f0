"""The digest in `config.json`: made at every save, compared when asked, by `check` and before a push."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    check_donor,
    compose,
    push_donor,
)
from testing.commands import done, failed, invoke
from testing.donors import organ, with_organs

T = TransplantedForCausalLM.from_pretrained
FILE = "model.safetensors"


@pytest.fixture(scope="module")
def base(base_repo: Callable[[str], str]) -> str:
    return base_repo("llama")


def digests(folder: Path) -> dict[str, str]:
    return json.loads((folder / "config.json").read_text())["digests"]


def damage(file: Path) -> None:
    """Change one bit of the last value."""
    content = bytearray(file.read_bytes())
    content[-4] ^= 1
    file.write_bytes(content)


@pytest.fixture
def damaged(base, tmp_path) -> Path:
    organ(base, 1).save_pretrained(tmp_path / "damaged")
    damage(tmp_path / "damaged" / FILE)
    return tmp_path / "damaged"


def test_it_is_what_the_documentation_says(base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    lines = "".join(
        json.dumps([name, "F32", list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]).replace(
            ", ", ","
        )
        + "\n"
        for name, tensor in sorted(tensors.items())
    )
    assert digests(tmp_path) == {FILE: hashlib.sha256(lines.encode()).hexdigest()}


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "bytes"])
def test_it_follows_names_dtypes_shapes_and_bytes(change, base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / FILE)
    first, second = sorted(tensors)[:2]
    tensor = tensors.pop(first)
    if change == "name":
        tensors[f"{first}s"] = tensor
    elif change == "dtype":
        tensors[first] = tensor.view(torch.int32).view(torch.float32).to(torch.float64)
    elif change == "shape":
        tensors[first] = tensor[None]
    else:
        tensors[first], tensors[second] = tensor, tensors[second].flip(0).contiguous()
    save_file(tensors, tmp_path / FILE)
    with pytest.raises(CorruptDonorError, match="damaged or of another save: their digest is"):
        DonorModel.from_pretrained(tmp_path, verify=True)


def test_it_does_not_depend_on_files(base, tmp_path):
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path / "single")
    donor.save_pretrained(tmp_path / "sharded", max_shard_size="8KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    assert digests(tmp_path / "single") == digests(tmp_path / "sharded")
    assert DonorModel.from_pretrained(tmp_path / "sharded", verify=True)
    damage(sorted((tmp_path / "sharded").glob("*.safetensors"))[1])
    with pytest.raises(CorruptDonorError, match="their digest is"):
        DonorModel.from_pretrained(tmp_path / "sharded", verify=True)


def test_each_variant_has_its_own(base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    organ(base, 2).save_pretrained(tmp_path, variant="fp16")
    organ(base, 3).save_pretrained(tmp_path)
    assert digests(tmp_path).keys() == {FILE, "model.fp16.safetensors"}
    DonorModel.from_pretrained(tmp_path, verify=True)
    DonorModel.from_pretrained(tmp_path, verify=True, variant="fp16", dtype=torch.bfloat16)
    damage(tmp_path / "model.fp16.safetensors")
    DonorModel.from_pretrained(tmp_path, verify=True)
    with pytest.raises(CorruptDonorError, match=r"tensors of model\.fp16\.safetensors are damaged"):
        DonorModel.from_pretrained(tmp_path, verify=True, variant="fp16")
    with pytest.raises(CorruptDonorError, match=r"tensors of model\.fp16\.safetensors are damaged"):
        push_donor(tmp_path, "me/variant-digest")


@pytest.mark.parametrize(
    "load",
    [
        lambda base, folder: DonorModel.from_pretrained(folder, verify=True),
        lambda base, folder: T(base, folder, verify=True),
        lambda base, folder: AutoModelForCausalLM.from_pretrained(folder, verify=True),
        lambda base, folder: T(base, organ(base, 2)).load_donor(folder, "b", verify=True),
        lambda base, folder: T(base, organ(base, 2)).hotswap_donor("default", folder, verify=True),
        lambda base, folder: push_donor(folder, "me/never-pushed"),
    ],
    ids=["donor", "transplanted", "auto", "load_donor", "hotswap_donor", "push_donor"],
)
def test_damage_is_found_when_asked_and_before_a_push(load, base, damaged):
    DonorModel.from_pretrained(damaged)  # finite values, so a plain load cannot tell
    with pytest.raises(CorruptDonorError, match=r"tensors of model\.safetensors are damaged or of another save"):
        load(base, damaged)
    assert not HfApi().repo_exists("me/never-pushed")
    organ(base, 1).save_pretrained(damaged)  # the message says so
    if load(base, damaged):
        HfApi().delete_repo("me/never-pushed", missing_ok=True)


def test_what_has_no_digest_cannot_be_verified(base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    del values["digests"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(NotHFError, match=r"has no digest of model\.safetensors, .* without verify=True and save it"):
        DonorModel.from_pretrained(tmp_path, verify=True)
    with pytest.raises(NotHFError, match="a DonorModel in memory has no digest"):
        T(base, DonorModel.from_pretrained(tmp_path), verify=True)
    assert check_donor(tmp_path, base) == []
    push_donor(tmp_path, "me/without-digest")


@pytest.mark.slow
def test_check_reads_what_is_here_and_downloads_nothing(base, damaged, hub):
    result = invoke("check", damaged, base)
    assert result.exit_code == 1 and "their digest is" in result.stdout and "1 mismatch" in result.stderr
    repo = HfApi().create_repo("me/damaged-digest").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=damaged)
    hub.requests.clear()
    assert done("check", repo, base)["compatible"]  # headers alone
    header = int.from_bytes((damaged / FILE).read_bytes()[:8], "little")
    assert sum(record.bytes for record in hub.requests if record.path.startswith("/lfs/")) == 8 + header
    DonorModel.from_pretrained(repo)  # now it is in the cache
    hub.requests.clear()
    (problem,) = check_donor(repo, base)
    assert "damaged or of another save" in problem
    assert sum(record.bytes for record in hub.requests if record.path.startswith("/lfs/")) <= 8 + header


@pytest.mark.slow
def test_inspect_shows_it_without_reading_weights(base, damaged, tmp_path):
    assert done("inspect", damaged)["digests"] == {"default": digests(damaged)}
    assert digests(damaged)[FILE] in invoke("inspect", damaged).stdout
    compose(
        [OrganSource("a", organ(base, 1).push_to_hub("me/inspected-digest").repo_url.repo_id)], base
    ).save_pretrained(tmp_path / "listed")
    assert done("inspect", tmp_path / "listed")["digests"]["a"].keys() == {FILE}
    with_organs(base, 1, 2).save_pretrained(tmp_path / "both")
    shown = invoke("inspect", tmp_path / "both").stdout
    assert all(f"{digests(tmp_path / 'both' / name)[FILE]:.16}…" in shown for name in ("organ1", "organ2"))


def test_an_organ_saved_over_a_composition_lists_its_own_alone(base, tmp_path):
    with_organs(base, 1, 2).save_pretrained(tmp_path)
    organ(base, 1).save_pretrained(tmp_path)
    assert list(DonorConfig.from_pretrained(tmp_path).digests) == ["model.safetensors"]


@pytest.mark.slow
def test_a_composition_lists_that_of_each_organ(base, tmp_path):
    model = with_organs(base, 1, 2)
    model.save_pretrained(tmp_path / "both")
    expected = {f"{name}/{FILE}": digests(tmp_path / "both" / name)[FILE] for name in ("organ1", "organ2")}
    assert digests(tmp_path / "both") == expected
    assert T(tmp_path / "both", verify=True).active_donors == ["organ1", "organ2"]
    organ(base, 5).save_pretrained(tmp_path / "both" / "organ2")  # people save into it
    assert T(tmp_path / "both", verify=True).active_donors == ["organ1", "organ2"]
    damage(tmp_path / "both" / "organ2" / FILE)
    with pytest.raises(CorruptDonorError, match="their digest is"):
        T(tmp_path / "both", verify=True)
    (problem,) = check_donor(tmp_path / "both", base)
    assert problem.startswith("organ 'organ2': the tensors of model.safetensors are damaged")
    assert "their digest is" in failed("push", tmp_path / "both", "me/damaged-composition")


def test_a_copied_donor_is_compared(base, damaged, tmp_path):
    plan = compose([OrganSource("a", damaged)], base)
    with pytest.raises(CorruptDonorError, match="their digest is"):
        plan.save_pretrained(tmp_path / "plan")
    assert not (tmp_path / "plan").exists()
    organ(base, 1).save_pretrained(damaged)
    plan.save_pretrained(tmp_path / "plan")
    assert digests(tmp_path / "plan") == {f"a/{FILE}": digests(damaged)[FILE]}


def test_a_donor_in_memory_has_none(base, tmp_path):
    """Its tensors may change."""
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path)
    assert donor.config.digests is None and DonorModel.from_pretrained(tmp_path).config.digests is None
    model = T(base, tmp_path)
    assert model.donor_config["default"].digests is None
    with torch.no_grad():
        next(model._surgery.organs["default"].layers[0].parameters()).add_(1)
    model.save_pretrained(tmp_path / "changed")
    assert DonorModel.from_pretrained(tmp_path / "changed", verify=True)
    assert DonorConfig.from_pretrained(tmp_path / "changed").digests != DonorConfig.from_pretrained(tmp_path).digests


def test_a_copy_of_a_folder_is_the_same_donor(base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path / "donor")
    shutil.copytree(tmp_path / "donor", tmp_path / "copy")
    assert DonorModel.from_pretrained(tmp_path / "copy", verify=True)


@pytest.mark.parametrize("value", [3, [], {"model.safetensors": 3}, ["x"]])
def test_a_digest_that_is_none_is_refused(value, base, tmp_path):
    organ(base, 1).save_pretrained(tmp_path)
    values = {**json.loads((tmp_path / "config.json").read_text()), "digests": value}
    (tmp_path / "config.json").write_text(json.dumps(values))
    with pytest.raises(CorruptDonorError, match="digests"):
        DonorModel.from_pretrained(tmp_path, verify=True)
    organ(base, 1).save_pretrained(tmp_path)  # and can be saved over
    assert DonorModel.from_pretrained(tmp_path, verify=True)
