"""Delta files: an organ stored as what training changed, read back by every door, and refused when it is not whole."""

from __future__ import annotations

import copy
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM, pipeline

from local_hub import DEFAULT_TOKEN
from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    check_donor,
    compose,
    merge_donor,
    push_donor,
)
from not_hf.hub.checkpoint import open_checkpoint
from testing.checkpoints import write_fp8
from testing.commands import invoke, is_one_line
from testing.cuts import nbytes
from testing.cuts import weights as served
from testing.donors import edit_json, moved, organ, same, weights
from testing.models import exact_logits as logits
from testing.models import tiny_model
from testing.releases import dequantizes_fp8
from testing.shapes import ARCHITECTURES, broadly
from testing.wrappers import wrapper

SPAN = (1, 3)
FILE = "model.delta.safetensors"
Q = "organ.layers.0.self_attn.q_proj.weight"


def trained(base: str | Path, rank: int = 2, seed: int = 1, **options) -> DonorModel:
    """Layers of a base with a change of that rank in every matrix, and any in the rest."""
    donor = DonorModel.from_base(base, SPAN, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            if parameter.ndim < 2:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
                continue
            *batch, rows, columns = parameter.shape
            factors = (torch.randn(*batch, *each, generator=generator) for each in ((rows, rank), (rank, columns)))
            parameter.add_(0.05 * torch.matmul(*factors).to(parameter.dtype))
    return donor


def close(ours: DonorModel, theirs: DonorModel) -> bool:
    """Whether they are equal within rounding, vectors bit for bit."""
    pairs = [(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items()]
    vectors = all(torch.equal(*pair) for pair in pairs if pair[0].ndim < 2)
    return vectors and all(torch.allclose(*pair, atol=1e-6, rtol=1e-5) for pair in pairs)


@pytest.fixture(scope="module")
def base(base_folder) -> Path:
    return base_folder("llama")


@pytest.fixture(scope="module")
def saved(base, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("delta")
    trained(base).save_pretrained(folder, delta="low_rank", rank=2)
    return folder


@broadly((*ARCHITECTURES, "bert"))
def test_a_change_of_that_rank_is_read_back(model_type, base_folder, tmp_path):
    donor = trained(base_folder(model_type))
    donor.save_pretrained(tmp_path / "whole")
    donor.save_pretrained(tmp_path / "delta", delta="low_rank", rank=2)
    again = DonorModel.from_pretrained(tmp_path / "delta", verify=True)
    assert close(again, donor) and again.dtype == donor.dtype
    size = {name: sum(file.stat().st_size for file in (tmp_path / name).glob("*.s*")) for name in ("whole", "delta")}
    assert size["delta"] < 0.8 * size["whole"]
    assert DonorConfig.from_pretrained(tmp_path / "delta").delta["lost"] < 1e-5
    assert again.config.delta is None  # its tensors may change
    again.save_pretrained(tmp_path / "again")
    assert same(DonorModel.from_pretrained(tmp_path / "again"), again)


@pytest.mark.slow
def test_what_a_rank_leaves_out_is_said(base, tmp_path):
    donor, lost = trained(base, rank=8), []
    for rank in (1, 2, 4):
        donor.save_pretrained(tmp_path / str(rank), delta="low_rank", rank=rank)
        config = DonorConfig.from_pretrained(tmp_path / str(rank))
        lost.append(config.delta["lost"])
        again = DonorModel.from_pretrained(tmp_path / str(rank))
        pairs = [(again.state_dict()[name], tensor) for name, tensor in donor.state_dict().items() if tensor.ndim > 1]
        start = DonorModel.from_base(base, SPAN).state_dict()
        missing = sum(float((ours - theirs).norm() ** 2) for ours, theirs in pairs) ** 0.5
        change = sum(float((t - start[n]).norm() ** 2) for n, t in donor.state_dict().items() if t.ndim > 1) ** 0.5
        assert lost[-1] == pytest.approx(missing / change, rel=1e-3)
        card = (tmp_path / str(rank) / "README.md").read_text()
        assert f"rank {rank}; {lost[-1]:.2%} of the change is left out" in card
    assert 1 > lost[0] > lost[1] > lost[2] > 0.1


def test_bfloat16_rounds_the_change_not_the_organ(base, tmp_path):
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path, delta="bfloat16")
    again, start = DonorModel.from_pretrained(tmp_path), DonorModel.from_base(base, SPAN)
    for name, tensor in donor.state_dict().items():
        before = start.state_dict()[name]
        expected = tensor if tensor.ndim < 2 else before + (tensor - before).bfloat16().float()
        assert torch.equal(again.state_dict()[name], expected)
    stored = load_file(tmp_path / FILE)
    assert stored[f"{Q}.delta"].dtype == torch.bfloat16 and Q not in stored
    assert DonorConfig.from_pretrained(tmp_path).delta["lost"] < 0.01


def test_layers_of_16_bits_and_an_organ_of_32(tmp_path):
    tiny_model("llama").bfloat16().save_pretrained(tmp_path / "base")
    donor = moved(DonorModel.from_base(tmp_path / "base", SPAN, dtype=torch.float32), 1)
    donor.save_pretrained(tmp_path / "delta", delta="bfloat16")
    again = DonorModel.from_pretrained(tmp_path / "delta")
    assert again.dtype == torch.float32
    assert all(torch.allclose(t, again.state_dict()[n], atol=2e-3) for n, t in donor.state_dict().items())


def test_tensors_for_which_a_change_is_no_smaller_are_whole(base, tmp_path):
    donor = organ(base, 1)
    donor.save_pretrained(tmp_path, delta="low_rank", rank=12)
    stored, tensors = load_file(tmp_path / FILE), donor.state_dict()
    whole = {name for name in tensors if name in stored}
    assert {name.split(".")[-2] for name in whole} >= {"input_layernorm", "k_proj", "v_proj"}
    assert "gate_proj" not in {name.split(".")[-2] for name in whole}
    again = DonorModel.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[name], tensors[name]) for name in whole)


@pytest.mark.slow
@pytest.mark.parametrize("modules", ["outputs", "attention", ["up_proj", "input_layernorm"]], ids=str)
def test_parts_of_layers(modules, base, tmp_path):
    donor = trained(base, mode="replace", modules=modules)
    donor.save_pretrained(tmp_path, delta="low_rank", rank=2)
    assert close(DonorModel.from_pretrained(tmp_path, verify=True), donor)
    assert check_donor(tmp_path, base) == []
    merge_donor(tmp_path, tmp_path / "merged")
    model = TransplantedForCausalLM.from_pretrained(tmp_path).merge_and_unload()
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "merged"), model)


def test_what_stands_beside_the_layers_is_whole(base, tmp_path):
    donor = trained(base, modules_to_save=["lm_head"], trainable_token_indices=[3, 5])
    donor.save_pretrained(tmp_path, delta="low_rank", rank=2)
    again = DonorModel.from_pretrained(tmp_path, verify=True)
    assert close(again, donor) and again.config.modules_to_save == ["lm_head"]
    head = [name for name in load_file(tmp_path / FILE) if "lm_head" in name]
    assert head and not any(".delta" in name for name in head)


def test_an_organ_that_began_as_a_no_op(base, tmp_path, token_ids):
    DonorModel.from_base(base, SPAN, init="identity").save_pretrained(tmp_path, delta="low_rank", rank=15)
    again = DonorModel.from_pretrained(tmp_path)
    assert again.config.init == "identity"
    names = [name for name, t in again.state_dict().items() if name.endswith("down_proj.weight")]
    assert names and all(again.state_dict()[name].shape == (32, 48) for name in names)


@pytest.mark.slow
def test_every_door(saved, base, token_ids, tmp_path):
    donor = DonorModel.from_pretrained(saved)
    expected = logits(TransplantedForCausalLM.from_pretrained(base, donor), token_ids)
    assert same(AutoModel.from_pretrained(saved), donor)
    for model in (
        TransplantedForCausalLM.from_pretrained(saved),
        TransplantedForCausalLM.from_pretrained(base, saved, verify=True),
        AutoModelForCausalLM.from_pretrained(saved),
        pipeline("text-generation", model=str(saved)).model,
    ):
        assert torch.equal(logits(model, token_ids), expected)
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 5), donor_name="a")
    model.hotswap_donor("a", saved)
    assert torch.equal(logits(model, token_ids), expected)
    model.load_donor(saved, "b", position=0)
    assert all(torch.equal(tensor, weights(model, "a")[key]) for key, tensor in weights(model, "b").items())
    assert model.donor_config["a"].delta is None
    assert check_donor(saved, base) == []
    assert "as a change of the base's layers, rank 2" in invoke("inspect", saved).output


def test_merging_copies_what_it_computes(saved, base, tmp_path):
    assert merge_donor(saved, tmp_path / "ours").built_because is None
    TransplantedForCausalLM.from_pretrained(saved).merge_and_unload().save_pretrained(tmp_path / "theirs")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("ours", "theirs"))
    assert same(ours, theirs)


@pytest.mark.parametrize("embed", [False, True])
def test_a_composition_of_them(embed, saved, base, tmp_path, token_ids):
    model = TransplantedForCausalLM.from_pretrained(base, trained(base), donor_name="a")
    model.load_donor(trained(base, seed=2), "b", position=0)
    if embed:
        plan = compose([saved], base)
        assert plan.organs[0].num_parameters == model.get_donor_status()["a"].num_parameters
        plan.save_pretrained(tmp_path)
        model.delete_donor("b")
    else:
        model.save_pretrained(tmp_path, delta="low_rank", rank=2)
    assert list(tmp_path.rglob("*.safetensors")) == list(tmp_path.rglob(FILE))
    again = TransplantedForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(logits(again, token_ids), logits(model, token_ids), atol=1e-5, rtol=1e-4)


def test_an_organ_in_another_recipient_is_a_change_of_what_it_was_cut_from(base, tmp_path):
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "other")
    donor = trained(base)
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "other", donor)
    model.save_pretrained(tmp_path / "delta", delta="low_rank", rank=2)
    config = DonorConfig.from_pretrained(tmp_path / "delta")
    assert config.base_model_name_or_path == str(tmp_path / "other")
    assert config.delta["base_model_name_or_path"] == str(base) and config.delta["lost"] < 1e-5
    assert close(DonorModel.from_pretrained(tmp_path / "delta"), donor)


@pytest.mark.slow
def test_on_the_hub(base_repo, cache, hub, tmp_path, token_ids):
    """The base is pinned, and of it only the layers are fetched."""
    repo = base_repo("llama")
    donor = trained(repo)
    donor.push_to_hub("me/delta-organ", delta="low_rank", rank=2)
    assert {file for file in HfApi().list_repo_files("me/delta-organ") if "safetensors" in file} == {FILE}
    config = DonorConfig.from_pretrained("me/delta-organ")
    assert config.delta["base_revision"] == HfApi().model_info(repo).sha
    assert "of which loading also reads the same layers" in ModelCard.load("me/delta-organ").text
    shutil.rmtree(cache, ignore_errors=True)
    hub.requests.clear()
    assert close(DonorModel.from_pretrained("me/delta-organ"), donor)
    assert nbytes(donor) < sum(record.bytes for record in served(hub)) < 2.5 * nbytes(donor)  # headers weigh here
    expected = logits(TransplantedForCausalLM.from_pretrained(repo, donor), token_ids)
    found = logits(AutoModelForCausalLM.from_pretrained("me/delta-organ"), token_ids)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    model = TransplantedForCausalLM.from_pretrained("me/delta-organ")
    model.push_to_hub("me/delta-organ", delta="bfloat16")
    model.push_to_hub("me/delta-organ")  # whole: nothing of the delta stays
    files = HfApi().list_repo_files("me/delta-organ")
    assert "model.safetensors" in files and FILE not in files
    assert DonorConfig.from_pretrained("me/delta-organ").delta is None


@pytest.mark.slow
def test_a_whole_folder_is_pushed_as_a_delta(base_repo, tmp_path):
    donor = trained(base_repo("llama"))
    donor.save_pretrained(tmp_path / "whole")
    before = {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()}
    done = invoke("push", tmp_path / "whole", "me/pushed-delta", "--delta", "low_rank", "--rank", "2")
    assert done.exit_code == 0, done.output
    assert {file.name: file.read_bytes() for file in (tmp_path / "whole").iterdir()} == before
    assert close(DonorModel.from_pretrained("me/pushed-delta", verify=True), donor)
    assert "rank 2" in ModelCard.load("me/pushed-delta").text
    donor.save_pretrained(tmp_path / "delta", delta="bfloat16")
    push_donor(tmp_path / "delta", "me/pushed-again")
    assert same(DonorModel.from_pretrained("me/pushed-again"), DonorModel.from_pretrained(tmp_path / "delta"))
    with pytest.raises(NotHFError, match="is already a delta"):
        push_donor(tmp_path / "delta", "me/pushed-again", delta="bfloat16")


def test_a_delta_of_a_folder_on_this_machine_is_not_pushed(base_folder, base_repo, tmp_path):
    """Until its config names a base on the Hub that holds the same layers."""
    trained(base_folder("llama")).save_pretrained(tmp_path / "alone", delta="bfloat16")
    compose([tmp_path / "alone"]).save_pretrained(tmp_path / "listed")
    for folder, place in (("alone", ""), ("listed", "alone")):
        where = tmp_path / folder / place
        with pytest.raises(NotHFError, match=f"folder on this machine; save {where} whole, or name the base's Hub ID"):
            push_donor(tmp_path / folder, "me/delta-of-a-folder")
        edit_json(where / "config.json", delta__base_model_name_or_path=base_repo("llama"))
        push_donor(tmp_path / folder, f"me/delta-{folder}")
    assert not HfApi().repo_exists("me/delta-of-a-folder")
    pushed = DonorModel.from_pretrained("me/delta-listed", subfolder="alone")
    assert same(pushed, DonorModel.from_pretrained(tmp_path / "alone"))


@pytest.mark.slow
def test_the_token_of_a_save_reads_the_base(base_folder, tmp_path, monkeypatch):
    HfApi().create_repo("me/delta-private", private=True)
    HfApi().upload_folder(repo_id="me/delta-private", folder_path=base_folder("llama"))
    donor = trained("me/delta-private", cache_dir=tmp_path / "cache")
    model = TransplantedForCausalLM.from_pretrained(base_folder("llama"), donor)
    monkeypatch.delenv("HF_TOKEN")
    for name, each in (("donor", donor), ("model", model)):
        each.save_pretrained(tmp_path / name, delta="bfloat16", token=DEFAULT_TOKEN)
        assert (tmp_path / name / FILE).exists()


def test_a_save_removes_what_it_replaces(base, tmp_path):
    donor = trained(base)
    for options, files in (({}, {"model.safetensors"}), ({"delta": "bfloat16"}, {FILE}), ({}, {"model.safetensors"})):
        donor.save_pretrained(tmp_path, **options)
        assert {file.name for file in tmp_path.glob("*.safetensors")} == files
        assert DonorConfig.from_pretrained(tmp_path).digests.keys() == files
    donor.save_pretrained(tmp_path, max_shard_size="20KB")
    donor.save_pretrained(tmp_path, delta="low_rank", rank=2, max_shard_size="20KB")
    assert {file.name for file in tmp_path.glob("*.s*")} == {FILE}


def test_a_release_that_knows_no_deltas_finds_no_weights(saved):
    with pytest.raises(OSError, match=r"has no model\.safetensors or model\.safetensors\.index\.json"):
        open_checkpoint(saved)


def edit(folder: Path, change) -> None:
    tensors = load_file(folder / FILE)
    change(tensors)
    save_file(tensors, folder / FILE, metadata={"format": "pt"})


BROKEN = {
    "missing": (lambda t: [t.pop(f"{Q}.delta_{end}") for end in ("up", "down")], f"missing {Q}"),
    "half missing": (lambda t: t.pop(f"{Q}.delta_up"), f"missing {Q}"),
    "twice": (lambda t: t.update({Q: torch.ones(32, 32)}), f"unexpected {Q}.delta_down"),
    "unexpected": (lambda t: t.update(bogus=torch.ones(2)), "unexpected bogus"),
    "of another kind": (lambda t: t.update({f"{Q}.delta": torch.ones(32, 32)}), f"unexpected {Q}.delta"),
    "of an unknown tensor": (
        lambda t: t.update({"x.delta_up": torch.ones(2, 1), "x.delta_down": torch.ones(1, 2)}),
        "unexpected x",
    ),
    "of other ranks": (lambda t: t.update({f"{Q}.delta_up": torch.ones(32, 3)}), "have no product"),
    "of other dimensions": (lambda t: t.update({f"{Q}.delta_up": torch.ones(32)}), "have no product"),
    "mis-shaped": (
        lambda t: t.update({f"{Q}.delta_up": torch.ones(3, 2)}),
        r"has shape \(3, 32\), expected \(32, 32\)",
    ),
    "not finite": (lambda t: t[f"{Q}.delta_up"].view(-1)[3].fill_(torch.nan), f"non-finite values in {Q}"),
    "of integers": (lambda t: t.update({f"{Q}.delta_up": torch.ones(32, 2, dtype=torch.int64)}), "not floating-point"),
    "empty": (lambda t: t.update({f"{Q}.delta_up": torch.ones(0, 2)}), "is empty"),
    "of another norm": (
        lambda t: t.update({"organ.layers.0.input_layernorm.weight": torch.ones(3)}),
        r"has shape \(3,\), expected \(32,\)",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_what_is_broken_is_refused(case, saved, tmp_path, token_ids):
    change, message = BROKEN[case]
    folder = Path(shutil.copytree(saved, tmp_path / "broken"))
    edit(folder, change)
    model = tiny_model("llama")
    before = logits(model, token_ids)
    with pytest.raises(NotHFError, match=message) as raised:
        TransplantedForCausalLM.from_pretrained(model, folder)
    assert is_one_line(raised.value) and torch.equal(logits(model, token_ids), before)
    if case != "not finite":
        assert re.search(message, " ".join(check_donor(folder, model)))  # headers show it
    with pytest.raises(CorruptDonorError, match=r"digest is|not floating|empty"):
        DonorModel.from_pretrained(folder, verify=True)


@pytest.mark.parametrize(
    "values",
    [
        {"kind": "sparse"},
        {"kind": None},
        {"dtype": "int8"},
        {"base_digest": ""},
        {"base_model_name_or_path": 3},
        {"base_revision": 3},
        {"more": 1},
    ],
    ids=str,
)
def test_a_config_that_says_nothing_valid_of_it(values, saved, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "broken"))
    delta = json.loads((folder / "config.json").read_text())["delta"]
    edit_json(folder / "config.json", delta=delta | values)
    with pytest.raises(CorruptDonorError, match="donor config delta") as raised:
        DonorModel.from_pretrained(folder)
    assert is_one_line(raised.value)


def test_another_base_is_an_error(saved, base, tmp_path):
    folder = Path(shutil.copytree(saved, tmp_path / "delta"))
    tiny_model("llama", seed=7).save_pretrained(tmp_path / "other")
    edit_json(folder / "config.json", delta__base_model_name_or_path=str(tmp_path / "other"))
    with pytest.raises(IncompatibleDonorError, match="not the layers that it was made with"):
        DonorModel.from_pretrained(folder)
    edit_json(folder / "config.json", delta__base_model_name_or_path=str(tmp_path / "gone"))
    with pytest.raises(OSError, match=r"a delta needs layers \[1, 3\) of .*, which cannot be read: .* under delta"):
        DonorModel.from_pretrained(folder)
    tiny_model("llama").save_pretrained(tmp_path / "gone")  # the same layers, in another place and other files
    assert same(DonorModel.from_pretrained(folder), DonorModel.from_pretrained(saved))


@dequantizes_fp8
def test_files_of_8_bits_have_no_change_to_store(tmp_path):
    (tmp_path / "base").mkdir()
    donor = DonorModel.from_base(write_fp8(tmp_path / "base"), SPAN, dtype=torch.float32)
    with pytest.raises(IncompatibleDonorError, match="hold quantized tensors in the place of the organ's"):
        donor.save_pretrained(tmp_path / "delta", delta="bfloat16")
    assert not (tmp_path / "delta").exists()


def test_the_layers_of_a_model_of_text_and_images(tmp_path):
    wrapper("llava").save_pretrained(tmp_path / "base")
    donor = trained(tmp_path / "base")
    donor.save_pretrained(tmp_path / "delta", delta="low_rank", rank=2)
    assert close(DonorModel.from_pretrained(tmp_path / "delta"), donor)


def test_what_no_delta_can_be_made_of(base, tmp_path):
    donor, target = trained(base), tmp_path / "delta"
    nameless = DonorModel.from_base(tiny_model("llama"), SPAN)
    half = copy.deepcopy(donor).bfloat16()
    other = copy.deepcopy(donor)
    other.config.base_model_name_or_path = str(tmp_path / "small")
    tiny_model("llama", num_hidden_layers=2).save_pretrained(tmp_path / "small")
    wide = copy.deepcopy(donor)
    wide.config.base_model_name_or_path = str(tmp_path / "wide")
    tiny_model("llama", intermediate_size=64).save_pretrained(tmp_path / "wide")
    for made, options, message in (
        (donor, {"delta": "sparse"}, "delta must be one of"),
        (donor, {"rank": 3}, "rank is for 'low_rank', got None and 3"),
        (donor, {"delta": "bfloat16", "rank": 3}, "rank is for 'low_rank'"),
        (donor, {"delta": "low_rank", "rank": 0}, "rank must be a positive integer, got 0"),
        (donor, {"delta": "low_rank", "rank": True}, "rank must be a positive integer"),
        (donor, {"delta": "low_rank"}, "a delta of rank 64 is no smaller than these layers"),
        (donor, {"delta": "bfloat16", "variant": "fp16"}, "leave out variant='fp16'"),
        (half, {"delta": "bfloat16"}, "a delta in bfloat16 is no smaller than these layers in torch.bfloat16"),
        (nameless, {"delta": "bfloat16"}, "this donor names none"),
        (other, {"delta": "bfloat16"}, "has no tensors for layers"),
        (wide, {"delta": "bfloat16"}, r"hold other tensors in the place of the organ's .*mlp"),
        (donor, {"delta": "bfloat16", "push_to_hub": True}, "is a folder on this machine"),
    ):
        with pytest.raises(NotHFError, match=message) as raised:
            made.save_pretrained(target, **options)
        assert is_one_line(raised.value) and not target.exists()
    with pytest.raises(NotHFError, match="is a folder on this machine"):
        donor.push_to_hub("me/no-delta", delta="bfloat16")
    model = TransplantedForCausalLM.from_pretrained(base, donor)
    with pytest.raises(NotHFError, match="delta must be one of"):
        model.save_pretrained(target, delta="sparse")
    assert not target.exists()
