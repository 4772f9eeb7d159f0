"""What is broken is refused with one typed, clear line, and the recipient stays as it was, bit for bit."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    check_compatibility,
)
from testing import tree
from testing.commands import is_one_line
from testing.donors import edit_json, moved
from testing.models import tiny_model

SPAN = (1, 3)


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    """A sound donor, saved."""
    folder = tmp_path_factory.mktemp("sound")
    DonorModel.from_base(tiny_model("llama"), SPAN).save_pretrained(folder)
    return folder


@pytest.fixture
def donor_folder(sound, tmp_path) -> Path:
    """A copy of the sound donor, to be broken."""
    return Path(shutil.copytree(sound, tmp_path / "donor"))


def edit_tensors(change):
    def apply(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        change(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def edit_config(**values):
    def apply(folder: Path) -> None:
        edit_json(folder / "config.json", **values)

    return apply


def write(file: str, content: bytes):
    return lambda folder: (folder / file).write_bytes(content)


def truncate(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def index_outside(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    shutil.move(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "../elsewhere.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


Q = "organ.layers.0.self_attn.q_proj.weight"
BROKEN = {
    "missing tensor": (edit_tensors(lambda t: t.pop(Q)), CorruptDonorError, f"missing {Q}"),
    "extra tensor": (edit_tensors(lambda t: t.update(bogus=torch.ones(2))), CorruptDonorError, "unexpected bogus"),
    "extra layer": (
        edit_tensors(lambda t: t.update({Q.replace("0", "2", 1): t[Q].clone()})),
        CorruptDonorError,
        "unexpected organ.layers.2",
    ),
    "mis-shaped tensor": (
        edit_tensors(lambda t: t.update({Q: torch.ones(3, 3)})),
        CorruptDonorError,
        r"\(3, 3\), expected \(32, 32\)",
    ),
    "NaN": (edit_tensors(lambda t: t[Q].view(-1)[5].fill_(float("nan"))), CorruptDonorError, f"non-finite .*{Q}"),
    "infinity": (edit_tensors(lambda t: t[Q].view(-1)[5].fill_(float("inf"))), CorruptDonorError, f"non-finite .*{Q}"),
    "empty tensor": (edit_tensors(lambda t: t.update({Q: torch.ones(0, 32)})), CorruptDonorError, "is empty"),
    "integer tensor": (
        edit_tensors(lambda t: t.update({Q: torch.ones(32, 32, dtype=torch.int64)})),
        CorruptDonorError,
        "I64, not floating-point",
    ),
    "no tensor at all": (edit_tensors(lambda t: t.clear()), CorruptDonorError, "holds no tensor"),
    "truncated file": (truncate, CorruptDonorError, "not a whole safetensors file"),
    "garbage file": (write("model.safetensors", b"\0" * 64), CorruptDonorError, "not a whole safetensors file"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), OSError, "has no model.safetensors"),
    "index names a file outside": (index_outside, CorruptDonorError, "not beside it"),
    "index is no index": (
        lambda f: ((f / "model.safetensors").unlink(), write("model.safetensors.index.json", b"[]")(f)),
        CorruptDonorError,
        "not a safetensors index",
    ),
    "config lies about its span": (
        edit_config(layers=[0, 3]),
        CorruptDonorError,
        "are 3 layers, but organ_config has 2",
    ),
    "config lies about its layers": (
        edit_config(layers=[0, 3], organ_config__num_hidden_layers=3),
        CorruptDonorError,
        "missing organ.layers.2",
    ),
    "config names a span the base lacks": (
        edit_config(layers=[3, 5]),
        CorruptDonorError,
        "must be a span",
    ),
    "config with a wrong type": (edit_config(layers="4-7"), CorruptDonorError, "layers"),
    "config with three ends": (edit_config(layers=[1, 2, 3]), CorruptDonorError, "two integers"),
    "config without an organ": (edit_config(organ_config=None), CorruptDonorError, "no organ_config"),
    "config with a wrong organ": (edit_config(organ_config__hidden_size="x"), CorruptDonorError, "organ_config"),
    "config of an unknown mode": (edit_config(mode="graft"), CorruptDonorError, "graft"),
    "config with a negative position": (edit_config(position=-1), CorruptDonorError, "-1"),
    "config of another width": (
        edit_config(organ_config__hidden_size=64, organ_config__head_dim=16),
        (CorruptDonorError, IncompatibleDonorError),
        "64",
    ),
    "config contradicts itself": (
        edit_config(organ_config__intermediate_size=96),
        CorruptDonorError,
        "organ_config contradicts layers .* intermediate_size is 96, not 48",
    ),
    "config with a list for an organ": (edit_config(organ_config=[1]), CorruptDonorError, "no organ_config"),
    "config with an unknown dtype": (edit_config(dtype="x"), CorruptDonorError, "config.json"),
    "config with a number for donors": (edit_config(donors=3), CorruptDonorError, "donors"),
    "config with an empty composition entry": (
        edit_config(donors=[None]),
        CorruptDonorError,
        "needs a name, and a donor",
    ),
    "config is a list": (write("config.json", b"[]"), CorruptDonorError, "must hold a JSON object"),
    "config is a number": (write("config.json", b"3"), CorruptDonorError, "must hold a JSON object"),
    "config is no JSON": (write("config.json", b"{"), OSError, "valid JSON"),
    "config of a native model": (
        lambda folder: tiny_model("llama").config.save_pretrained(folder),
        NotHFError,
        "not a donor",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
@pytest.mark.parametrize("has_organ", [False, True], ids=["native", "transplanted"])
def test_a_broken_donor_is_refused_and_changes_nothing(case, has_organ, donor_folder, token_ids, caplog):
    damage, error, message = BROKEN[case]
    damage(donor_folder)
    model = tiny_model("llama")
    if has_organ:
        model = TransplantedForCausalLM.from_pretrained(model, DonorModel.from_base(model, (0, 1)), donor_name="first")
    native, config = type(model), model.config.to_dict()
    flags = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    with torch.no_grad():
        before = model(token_ids).logits
    with pytest.raises(error, match=message) as raised:
        TransplantedForCausalLM.from_pretrained(model, donor_folder, donor_name="second")
    assert isinstance(raised.value, (ValueError, OSError))
    assert is_one_line(raised.value)
    assert type(model) is native and model.config.to_dict() == config
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == flags
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, before)
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    ("recipient", "options", "message"),
    [
        ({"hidden_size": 64}, {}, "donor hidden_size 32 does not fit recipient hidden_size 64"),
        ({"head_dim": 16}, {}, "donor head_dim 8 does not fit"),
        ({"num_key_value_heads": 4}, {}, "num_key_value_heads 2 does not fit"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, {}, "rope_parameters"),
        ({}, {"position": 5}, "position must be between 0 and 4"),
        ({}, {"position": -1}, "position must be between 0 and 4"),
        ({}, {"position": 3, "mode": "replace"}, "position must be between 0 and 2"),
        ({"num_hidden_layers": 1}, {"position": 0, "mode": "replace"}, "longer than the recipient"),
        ({}, {"mode": "graft"}, "graft"),
    ],
)
def test_an_organ_that_does_not_fit_is_refused(recipient, options, message, sound, token_ids):
    model = tiny_model("llama", **recipient)
    native, config = type(model), model.config.to_dict()
    with torch.no_grad():
        before = model(token_ids).logits
    with pytest.raises(IncompatibleDonorError, match=message) as raised:
        TransplantedForCausalLM.from_pretrained(model, sound, **options)
    assert is_one_line(raised.value)
    assert type(model) is native and model.config.to_dict() == config
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, before)


def test_another_architecture_is_refused(sound):
    with pytest.raises(IncompatibleDonorError, match="donor model_type llama does not fit recipient model_type qwen3"):
        TransplantedForCausalLM.from_pretrained(tiny_model("qwen3"), sound)


def test_check_compatibility_lists_every_mismatch_from_configs_alone(donor_folder, tmp_path):
    (donor_folder / "model.safetensors").unlink()
    assert check_compatibility(donor_folder, tiny_model("llama").config) == []
    tiny_model("mistral", hidden_size=64, head_dim=16, num_hidden_layers=2).config.save_pretrained(tmp_path)
    mismatches = check_compatibility(donor_folder, tmp_path)
    for key in ("model_type", "hidden_size", "head_dim", "sliding_window", "position"):
        assert sum(bool(re.search(rf"\b{key}\b", line)) for line in mismatches) >= 1, key
    assert check_compatibility(DonorConfig.from_pretrained(donor_folder), tmp_path) == mismatches


def test_layers_of_other_modules_are_told_beside_other_mismatches(sound):
    recipient = tiny_model("llama", num_key_value_heads=4, mlp_bias=True).config
    geometry, modules = check_compatibility(sound, recipient)
    assert "num_key_value_heads 2 does not fit" in geometry and "have other modules than the donor's" in modules
    assert "mlp.up_proj.bias" in modules
    assert len(check_compatibility(sound, recipient, position=9)) == 2  # where it would stand is not known


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({"mode": "replace", "position": 1}, {"mode": "replace", "position": 2}, r"layers \[2\] are already replaced"),
        ({"mode": "replace", "position": 1}, {"mode": "insert", "position": 2}, "inside a span"),
        ({"mode": "insert", "position": 2}, {"mode": "replace", "position": 1}, "inside a span"),
    ],
)
def test_overlapping_organs_are_refused(first, second, message, sound, token_ids):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), sound, donor_name="first", **first)
    with torch.no_grad():
        before = model(token_ids).logits
    with pytest.raises(IncompatibleDonorError, match=message):
        model.load_donor(sound, "second", **second)
    assert model.active_donors == ["first"] == list(model.donor_config)
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, before)


@pytest.mark.parametrize("name", ["default", "", "a/b", "a.b"])
def test_a_name_that_is_taken_or_no_plain_name_is_refused(name, sound):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), sound)
    with pytest.raises(NotHFError, match="donor_name"):
        model.load_donor(sound, name)


@pytest.mark.parametrize(
    ("layers", "options", "message"),
    [
        ((2, 2), {}, "half-open span"),
        ((3, 5), {}, "half-open span"),
        ((-1, 2), {}, "half-open span"),
        ((1, 3), {"position": 9}, "position must be between 0 and 4"),
        ((1, 3), {"position": 3, "mode": "replace"}, "position must be between 0 and 2"),
        ((1, 3), {"mode": "graft"}, "graft"),
        ((1, 3), {"init": "zero"}, "zero"),
    ],
)
def test_a_cut_out_of_range_is_refused(layers, options, message, base_folder):
    for base in (base_folder("llama"), tiny_model("llama")):
        with pytest.raises(NotHFError, match=message):
            DonorModel.from_base(base, layers, **options)


def test_layers_that_zero_projections_do_not_silence_are_refused():
    post_norm = tiny_model("opt", do_layer_norm_before=False)
    with pytest.raises(NotHFError, match="init='copy'"):
        DonorModel.from_base(post_norm, SPAN, init="identity")


def test_pytorch_model_bin_is_refused_with_the_way_out(tmp_path):
    model = tiny_model("llama")
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match=r"pytorch_model.bin, convert it first: .*save_pretrained"):
        DonorModel.from_base(tmp_path, SPAN)


def test_merging_what_a_native_model_cannot_hold_is_refused(sound, token_ids):
    """gpt2 with this flag scales attention by the layer's number, which an insertion changes."""
    base = tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True)
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, SPAN), position=0)
    with torch.no_grad():
        before = model(token_ids).logits
    with pytest.raises(IncompatibleDonorError, match="native model cannot hold"):
        model.merge_and_unload()
    assert model.active_donors == ["default"]
    with torch.no_grad():
        assert torch.equal(model(token_ids).logits, before)


def test_saving_an_empty_tensor_writes_nothing(tmp_path):
    donor = DonorModel.from_base(tiny_model("llama"), SPAN)
    state = {**donor.state_dict(), Q: torch.empty(0)}
    with pytest.raises(CorruptDonorError, match="empty"):
        donor.save_pretrained(tmp_path / "new", state_dict=state)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_no_load_takes_is_not_saved(value, sound, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), sound, donor_name="a", position=1)
    model.load_donor(sound, "b", position=1)
    model.save_pretrained(tmp_path)
    files = tree(tmp_path)
    with torch.no_grad():
        model.model.layers[3].mlp.up_proj.weight[0, 0] = value
    for names in (None, ["b"]):
        with pytest.raises(
            CorruptDonorError, match=r"cannot save tensors with NaN or infinity: organ.layers.0.mlp.up_proj"
        ):
            model.save_pretrained(tmp_path, selected_donors=names)
        assert tree(tmp_path) == files
    model.save_pretrained(tmp_path / "sound", selected_donors=["a"])


def test_a_full_disk_is_an_os_error_and_leaves_the_folder(donor_folder):
    resource = pytest.importorskip("resource", reason="Windows does not limit the size of files")
    files = tree(donor_folder)
    donor = moved(DonorModel.from_pretrained(donor_folder), 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError, match=r"donor cannot be written: .*; free space, save again") as raised:
            donor.save_pretrained(donor_folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_one_line(raised.value)
    assert tree(donor_folder) == files
