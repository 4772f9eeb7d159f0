"""Merging from file to file: the files are those of a merge in memory, and so are the refusals."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import transformers
from huggingface_hub import HfApi, constants, snapshot_download
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Model

import not_hf
from local_hub import Fault
from not_hf import (
    CorruptDonorError,
    DonorConfig,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    OrganSource,
    TransplantedForCausalLM,
    TransplantedForImageTextToText,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    compose,
    merge_donor,
    merged_card,
)
from not_hf.architecture.stack import is_encoder
from testing.checkpoints import write_fp8
from testing.commands import failed
from testing.cuts import weights
from testing.donors import edit_json, moved, organ
from testing.models import tiny_model, tiny_tokenizer
from testing.releases import dequantizes_fp8
from testing.shapes import ARCHITECTURES, broadly
from testing.wrappers import wrapper

SHARD = "20KB"


def merge_in_memory(donor: str | Path, folder: Path, base: str | Path | None = None, shard: str = SHARD) -> None:
    """What `merge_donor` does, by way of a model in memory."""
    first, second = (donor, None) if base is None else (base, donor)
    is_masked = is_encoder(DonorConfig.from_pretrained(donor).native_config("base_config"))
    model = (TransplantedForMaskedLM if is_masked else TransplantedForCausalLM).from_pretrained(first, second)
    card = merged_card(model, folder)
    model.merge_and_unload().save_pretrained(folder, max_shard_size=shard)
    AutoTokenizer.from_pretrained(first).save_pretrained(folder)
    card.save(folder / "README.md")


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_base(folder: Path, model_type: str = "llama", dtype: torch.dtype = torch.bfloat16, **config) -> Path:
    tiny_model(model_type, **config).to(dtype).save_pretrained(folder, max_shard_size="30KB")
    tiny_tokenizer().save_pretrained(folder)
    return folder


def write_organ(base: Path, folder: Path, seed: int = 1, **options) -> Path:
    """An organ in float32, which the recipient rounds."""
    organ(base, seed, dtype=torch.float32, **options).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    return write_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def donor(base, tmp_path_factory) -> Path:
    return write_organ(base, tmp_path_factory.mktemp("donor"))


@broadly((*ARCHITECTURES, "bert"))
def test_the_files_are_those_of_a_merge_in_memory(model_type, tmp_path):
    base = write_base(tmp_path / "base", model_type)
    donor = write_organ(base, tmp_path / "donor")
    merged = merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD)
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 1
    assert merged.num_layers == 6 and merged.architecture == type(tiny_model(model_type)).__name__
    if model_type not in ("gpt_neox", "gemma4_text"):  # releases of transformers differ
        has_experts = any("experts" in name for name, _ in tiny_model(model_type).named_modules())
        assert merged.built_because is None or has_experts


@pytest.mark.slow
def test_one_file_and_another_base(base, donor, tmp_path):
    other = write_base(tmp_path / "other", dtype=torch.float16, vocab_size=104)
    edit_json(other / "generation_config.json", max_length=33)
    merge_donor(donor, tmp_path / "ours", other)
    merge_in_memory(donor, tmp_path / "theirs", other, shard="5GB")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    assert "model.safetensors" in contents(tmp_path / "ours")


def test_a_recipient_without_a_tokenizer(tmp_path, caplog):
    tiny_model("llama").save_pretrained(tmp_path / "base")
    donor = write_organ(tmp_path / "base", tmp_path / "donor")
    merge_donor(donor, tmp_path / "merged", tmp_path / "base")
    assert "no tokenizer is saved with the merged model: " in caplog.text
    assert not list((tmp_path / "merged").glob("token*"))
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.num_hidden_layers == 6


@pytest.mark.slow
def test_several_organs_their_scales_and_one_that_rests(base, tmp_path):
    organs = [
        OrganSource("one", write_organ(base, tmp_path / "one", 1), position=1, scale=0.3),
        OrganSource("two", write_organ(base, tmp_path / "two", 2, mode="replace")),
        OrganSource("rests", write_organ(base, tmp_path / "rests", 3), position=0, active=False),
        OrganSource("four", write_organ(base, tmp_path / "four", 4, layers=(0, 1)), position=4, scale=-2.0),
    ]
    compose(organs, base).save_pretrained(tmp_path / "all")
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "all")
    model.generation_config.max_new_tokens = 7
    model.generation_config.save_pretrained(tmp_path / "all")  # the composition's own
    assert merge_donor(tmp_path / "all", tmp_path / "ours", max_shard_size=SHARD).built_because is None
    merge_in_memory(tmp_path / "all", tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["llama", "gemma3_text", "gpt2"])
def test_scaled_replacements(model_type, tmp_path, monkeypatch):
    """Computed from two files, which are read in parts of unlike length: one is float32, the other bfloat16."""
    monkeypatch.setattr("not_hf.hub.checkpoint.CHUNK", 1024)
    base = write_base(tmp_path / "base", model_type)
    organs = [
        OrganSource("parts", tmp_path / "parts", scale=0.7),
        OrganSource("whole", tmp_path / "whole", scale=-1.3),
        OrganSource("gone", tmp_path / "gone", scale=0.0),
    ]
    for seed, (layers, modules) in enumerate([((0, 1), "outputs"), ((1, 3), "all"), ((3, 4), "all")]):
        write_organ(base, organs[seed].donor, seed, layers=layers, mode="replace", modules=modules)
    compose(organs, base).save_pretrained(tmp_path / "all")
    assert merge_donor(tmp_path / "all", tmp_path / "ours", max_shard_size=SHARD).built_because is None
    merge_in_memory(tmp_path / "all", tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.slow
def test_the_scale_of_layers_with_other_shapes_is_refused_as_in_memory(tmp_path):
    base = write_base(tmp_path / "base", "gemma4_text")
    donor = write_organ(base, tmp_path / "donor", layers=(1, 2), mode="replace", position=2)
    edit_json(donor / "config.json", scale=0.5)
    for merge in (merge_in_memory, merge_donor):
        with pytest.raises(IncompatibleDonorError, match="organ 'default' has no scale but 1"):
            merge(donor, tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


@pytest.mark.slow
def test_a_base_that_was_saved_without_its_head(tmp_path):
    """openai-community/gpt2 names its tensors so."""
    base = write_base(tmp_path / "base", "gpt2", torch.float32)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    GPT2Model(tiny_model("gpt2").config).save_pretrained(tmp_path / "headless")
    (tmp_path / "headless" / "model.safetensors").rename(base / "model.safetensors")
    donor = write_organ(base, tmp_path / "donor")
    assert merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD).built_because is None
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_from_the_hub_only_what_is_needed_is_fetched_and_nothing_is_kept(base, tmp_path, hub):
    repo = HfApi().create_repo("me/merged-by-range").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=base)
    donor = write_organ(repo, tmp_path / "donor", mode="replace")
    assets = set(Path(constants.HF_ASSETS_CACHE).rglob("*.safetensors"))
    hub.requests.clear()
    merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD)
    served = sum(record.bytes for record in weights(hub))
    tensors = {key: value for file in base.glob("*.safetensors") for key, value in load_file(file).items()}
    needed = sum(t.nbytes for key, t in tensors.items() if not key.startswith(("model.layers.1.", "model.layers.2.")))
    assert needed <= served < 1.1 * needed + 20_000
    assert set(Path(constants.HF_ASSETS_CACHE).rglob("*.safetensors")) == assets
    hub.requests.clear()
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")
    snapshot_download(repo)  # now it is in the cache, and stays there
    hub.requests.clear()
    merge_donor(donor, tmp_path / "again", max_shard_size=SHARD)
    assert contents(tmp_path / "again") == contents(tmp_path / "theirs")
    assert sum(record.bytes for record in weights(hub)) < 20_000
    assert all(path.exists() for path in Path(constants.HF_HUB_CACHE).rglob("*.safetensors"))


@pytest.mark.slow
@pytest.mark.usefixtures("cache")
def test_a_download_that_fails_leaves_the_folder_as_it_was(base, tmp_path, api, hub):
    repo = HfApi().create_repo("me/merged-in-vain").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=base)
    donor = write_organ(repo, tmp_path / "donor", mode="replace")
    folder = tmp_path / "out"
    merge_in_memory(donor, folder, base)
    before = contents(folder)
    starts = ("bytes=0-", "bytes=8-")  # of headers

    def no_weights(method, path, headers):
        wanted = headers.get("range", "")
        return Fault(status=404) if path.startswith("/lfs/") and wanted and not wanted.startswith(starts) else None

    hub.fault = no_weights
    other = write_organ(base, tmp_path / "other", 2)
    for target in (folder, tmp_path / "new"):
        with pytest.raises(OSError, match="cannot be read"):
            merge_donor(other, target, repo, max_shard_size=SHARD)
    assert contents(folder) == before and not (tmp_path / "new").exists()


def in_one_file(base: Path, change) -> None:
    tensors = {key: value for file in base.glob("*.safetensors") for key, value in load_file(file).items()}
    change(tensors)
    for path in base.glob("*.safetensors*"):
        path.unlink()
    save_file(tensors, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "have another layout: model.norm.weight"),
        (lambda tensors: tensors.update({"lm_head.weight": torch.zeros(96, 32)}), "do not hold one of"),
        (lambda tensors: tensors.update({"norm.weight": torch.ones(32)}), "hold model.norm.weight twice"),
    ],
)
def test_files_that_are_not_the_model_are_merged_in_memory(change, reason, tmp_path, caplog):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    donor = write_organ(base, tmp_path / "donor")
    in_one_file(base, change)
    torch.manual_seed(0)
    merged = merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD)
    assert reason in merged.built_because
    (line,) = [message for message in caplog.messages if "built in memory" in message]
    assert reason in line and "\n" not in line
    torch.manual_seed(0)
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_tied_weights_are_written_once(tmp_path):
    base = write_base(tmp_path / "base", tie_word_embeddings=True)
    donor = write_organ(base, tmp_path / "donor")
    # stored under the name that is tied to the other
    in_one_file(base, lambda tensors: tensors.update({"lm_head.weight": tensors.pop("model.embed_tokens.weight")}))
    assert merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD).built_because is None
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_organs_that_rest_leave_the_base(base, donor, tmp_path):
    compose([OrganSource("rests", donor, active=False)], base).save_pretrained(tmp_path / "all")
    assert merge_donor(tmp_path / "all", tmp_path / "ours").built_because == "no organ is active"
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == tiny_model("llama").state_dict().keys()


def damage(donor: Path, change) -> None:
    tensors = load_file(donor / "model.safetensors")
    change(tensors)
    save_file(tensors, donor / "model.safetensors", metadata={"format": "pt"})


NORM, OUT = "organ.layers.1.input_layernorm.weight", "organ.layers.0.mlp.down_proj.weight"


@pytest.mark.parametrize("mode", ["replace", pytest.param("insert", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    ("change", "error"),
    [
        (lambda tensors: tensors[NORM].fill_(math.nan), CorruptDonorError),
        (lambda tensors: tensors[NORM].fill_(1e5), CorruptDonorError),  # not in float16
        (lambda tensors: tensors[OUT].fill_(4e4), NotHFError),  # not at scale 3
        (lambda tensors: tensors.pop(NORM), CorruptDonorError),
        (lambda tensors: tensors.update(foreign=torch.ones(2)), CorruptDonorError),
        (lambda tensors: tensors.update({NORM: torch.ones(31)}), CorruptDonorError),
        (lambda tensors: tensors.update({NORM: torch.ones(32, dtype=torch.int32)}), CorruptDonorError),
    ],
)
def test_a_damaged_organ_is_refused_as_in_memory(change, error, mode, tmp_path):
    base = write_base(tmp_path / "base", dtype=torch.float16)
    donor = write_organ(base, tmp_path / "donor", mode=mode)
    edit_json(donor / "config.json", scale=3.0, digests=None)
    damage(donor, change)
    with pytest.raises(error) as theirs:
        merge_in_memory(donor, tmp_path / "theirs")
    with pytest.raises(error) as ours:
        merge_donor(donor, tmp_path / "ours")
    assert str(ours.value) == str(theirs.value)
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model_type", "config", "scale", "error", "message"),
    [
        ("gpt2", {"scale_attn_by_inverse_layer_idx": True}, 1.0, IncompatibleDonorError, "cannot hold these layers"),
        ("gemma2", {}, 0.5, UnsupportedArchitectureError, "a norm undoes it"),
    ],
)
def test_what_cannot_be_merged_is_refused(model_type, config, scale, error, message, tmp_path):
    base = write_base(tmp_path / "base", model_type, **config)
    donor = write_organ(base, tmp_path / "donor", position=0)
    edit_json(donor / "config.json", scale=scale)
    for merge, folder in ((merge_in_memory, tmp_path / "theirs"), (merge_donor, tmp_path / "ours")):
        with pytest.raises(error, match=message):
            merge(donor, folder)
    assert not (tmp_path / "ours").exists()


@pytest.mark.slow
@dequantizes_fp8
def test_a_quantized_recipient_is_merged_in_memory(tmp_path, caplog):
    """Where transformers dequantizes it, as on CPU; elsewhere, the merge is refused."""
    (tmp_path / "base").mkdir()
    base = write_fp8(tmp_path / "base")
    tiny_tokenizer().save_pretrained(base)
    donor = write_organ(base, tmp_path / "donor")
    assert merge_donor(donor, tmp_path / "ours", max_shard_size=SHARD).built_because == "the recipient is quantized"
    assert "built in memory" in caplog.text
    merge_in_memory(donor, tmp_path / "theirs")
    assert contents(tmp_path / "ours") == contents(tmp_path / "theirs")


def test_what_is_merged_is_not_overwritten(tmp_path, monkeypatch):
    base = write_base(tmp_path / "base")
    donor = write_organ(base, tmp_path / "donor")
    compose([OrganSource("a", donor, position=0), OrganSource("b", donor)], base).save_pretrained(tmp_path / "both")
    other = write_organ(base, tmp_path / "other", 2)
    before = contents(tmp_path)
    monkeypatch.chdir(base)
    for source, folder, kind in (
        (donor, donor, "donor"),
        (donor, other, "donor"),
        ("../both", tmp_path / "both", "donor"),
        ("../both", donor, "donor"),
        (donor, base, "base"),
        (donor, ".", "base"),
    ):
        with pytest.raises(NotHFError, match=f"holds a {kind}, which the merged model would overwrite"):
            merge_donor(source, folder)
    assert f"error: {donor} holds a donor, " in failed("merge", donor, "-o", donor, "--force")
    assert contents(tmp_path) == before


def test_an_earlier_merge_is_overwritten(base, donor, tmp_path):
    first = write_base(tmp_path / "merged", "gpt2")
    (first / "chat_template.jinja").write_text("{{ messages }}")
    merge_donor(donor, first, base)
    assert [AutoTokenizer.from_pretrained(each).chat_template for each in (first, base)] == [None, None]
    merge_in_memory(donor, tmp_path / "theirs", base, shard="5GB")
    ours = contents(first)
    assert {name: ours[name] for name in contents(tmp_path / "theirs")} == contents(tmp_path / "theirs")


def test_new_tokens_bring_their_tokenizer_into_another_recipient(base, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<verse>"])
    grown = AutoModelForCausalLM.from_pretrained(base)
    grown.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    rows = {"embed_tokens": [len(tokenizer) - 1], "lm_head": [len(tokenizer) - 1]}
    donor = DonorModel.from_base(grown, (1, 3), mode="replace", trainable_token_indices=rows)
    donor.save_pretrained(tmp_path / "donor")
    tokenizer.save_pretrained(tmp_path / "donor")
    for other in (None, base):
        merge_donor(tmp_path / "donor", tmp_path / "merged", base=other)
        merged = AutoTokenizer.from_pretrained(tmp_path / "merged")
        assert [merged.convert_tokens_to_ids("<verse>")] == rows["lm_head"]
        assert AutoConfig.from_pretrained(tmp_path / "merged").vocab_size == len(tokenizer)


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["qwen3_vl", "llava"])
def test_layers_under_another_config(model_type, tmp_path):
    base = tmp_path / "base"
    wrapper(model_type).save_pretrained(base, max_shard_size="50KB")
    tiny_tokenizer().save_pretrained(base)
    moved(DonorModel.from_base(base, (1, 3)), 1).save_pretrained(tmp_path / "donor")
    merged = merge_donor(tmp_path / "donor", tmp_path / "ours", max_shard_size=SHARD)
    assert (merged.built_because is None) is (model_type == "qwen3_vl")  # the files of llava have older names
    assert merged.num_layers == 6
    model = TransplantedForImageTextToText.from_pretrained(tmp_path / "donor")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    theirs = contents(tmp_path / "theirs")
    assert {name: contents(tmp_path / "ours")[name] for name in theirs} == theirs


@pytest.mark.slow
@pytest.mark.parametrize("head", ["ForSequenceClassification", "Model"])
def test_a_recipient_keeps_the_head_that_its_config_names(head, tmp_path):
    config = tiny_model("llama", num_labels=3).config
    native, ours = getattr(transformers, f"Llama{head}"), getattr(not_hf, f"Transplanted{head}")
    base = tmp_path / "base"
    native(config).save_pretrained(base)
    tiny_tokenizer().save_pretrained(base)
    organ(tiny_model("llama"), 1).save_pretrained(tmp_path / "donor")
    merged = merge_donor(tmp_path / "donor", tmp_path / "ours", base, max_shard_size=SHARD)
    if head == "Model":  # names no head, and lacks that of a language model
        assert merged.architecture == "LlamaForCausalLM" and "lm_head.weight" in merged.built_because
        return
    assert (merged.architecture, merged.built_because) == (native.__name__, None)
    model = ours.from_pretrained(base, tmp_path / "donor")
    model.merge_and_unload().save_pretrained(tmp_path / "theirs", max_shard_size=SHARD)
    theirs = contents(tmp_path / "theirs")
    assert {name: contents(tmp_path / "ours")[name] for name in theirs} == theirs
