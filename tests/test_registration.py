"""transformers' own entry points, with local folders and with repo IDs over HTTP."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import infer_auto_device_map, init_empty_weights
from huggingface_hub import HfApi
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    LlamaForCausalLM,
    pipeline,
)

from not_hf import (
    DonorConfig,
    DonorModel,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForSequenceClassification,
)
from testing.models import logits, tiny_model
from testing.processes import run_python
from testing.releases import logged

PROMPT = "w5 w6 w7 w8"


@pytest.fixture(scope="module", params=["folder", "repo"])
def where(request, base_folder, base_repo, tmp_path_factory) -> tuple[str, str]:
    """A llama base and a donor cut from it, both as local folders or both as repo IDs."""
    if request.param == "folder":
        base, donor_id = str(base_folder("llama")), str(tmp_path_factory.mktemp("donor"))
        moved(base).save_pretrained(donor_id)
    else:
        base, donor_id = base_repo("llama"), "me/llama-organ"
        moved(base).push_to_hub(donor_id)
    return base, donor_id


def moved(base: str, **options) -> DonorModel:
    donor = DonorModel.from_base(base, layers=(1, 3), **options)
    with torch.no_grad():
        for n, parameter in enumerate(donor.parameters()):
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(n)))
    return donor


def test_auto_config_and_auto_model(where):
    base, donor_id = where
    config = AutoConfig.from_pretrained(donor_id)
    assert isinstance(config, DonorConfig)
    assert (config.base_model_name_or_path, config.layers, config.position) == (base, [1, 3], 3)
    assert (config.mode, config.init) == ("insert", "copy")
    organ = AutoModel.from_pretrained(donor_id)
    assert isinstance(organ, DonorModel)
    assert all(torch.equal(a, b) for a, b in zip(organ.parameters(), moved(base).parameters(), strict=True))


@pytest.mark.slow
def test_every_form_of_from_pretrained_gives_the_same_model(where, token_ids):
    base, donor_id = where
    live = AutoModelForCausalLM.from_pretrained(base)
    forms: list[Callable] = [
        lambda: TransplantedForCausalLM.from_pretrained(base, donor_id),
        lambda: TransplantedForCausalLM.from_pretrained(donor_id),
        lambda: TransplantedForCausalLM.from_pretrained(live, donor_id, donor_name="kjv"),
        lambda: TransplantedForCausalLM.from_pretrained(base, DonorModel.from_pretrained(donor_id)),
        lambda: AutoModelForCausalLM.from_pretrained(donor_id),
    ]
    results = []
    for form in forms:
        model = form()
        assert isinstance(model, TransplantedForCausalLM) and isinstance(model, LlamaForCausalLM)
        assert not model.training and not any(p.requires_grad for p in model.parameters())
        results.append(logits(model, token_ids))
    assert all(torch.equal(result, results[0]) for result in results)
    assert live.active_donors == ["kjv"]  # a live recipient is transplanted in place
    assert not torch.equal(results[0], logits(AutoModelForCausalLM.from_pretrained(base), token_ids))


@pytest.mark.parametrize("load", [TransplantedForCausalLM.from_pretrained, AutoModelForCausalLM.from_pretrained])
def test_options_reach_the_organ_and_the_base(where, load):
    model = load(where[1], position=0, mode="replace", dtype=torch.bfloat16, attn_implementation="eager")
    assert model.donor_config["default"].position == 0 and model.donor_config["default"].mode == "replace"
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.config._attn_implementation == "eager" and model.config.num_hidden_layers == 4
    assert all(layer.self_attn.config is model.config for layer in model.model.layers)


@pytest.mark.parametrize("load", [TransplantedForSequenceClassification, AutoModelForSequenceClassification])
def test_values_that_every_config_has_reach_the_recipient(where, load):
    chosen = {"num_labels": 1, "problem_type": "regression", "output_hidden_states": True, "return_dict": False}
    model = load.from_pretrained(where[1], **chosen)
    assert model.score.weight.shape[0] == 1
    assert {key: getattr(model.config, key) for key in chosen} == chosen
    named = load.from_pretrained(where[1], id2label={0: "a", 1: "b", 2: "c"}, label2id={"a": 0, "b": 1, "c": 2})
    assert named.score.weight.shape[0] == 3 and named.config.id2label[2] == "c"


def test_the_tokenizer_is_the_bases(where):
    assert AutoTokenizer.from_pretrained(where[1])(PROMPT).input_ids == [5, 6, 7, 8]


@pytest.mark.slow
@pytest.mark.parametrize("where", ["repo"], indirect=True)
def test_pipeline_works_and_logs_no_warning(where, token_ids):
    """In a process of its own, since warnings are logged once per process."""
    script = f"""
        import sys, torch
        import not_hf
        from transformers import pipeline
        pipe = pipeline("text-generation", model={where[1]!r}, device="cpu")
        out = pipe({PROMPT!r}, max_new_tokens=6, do_sample=False, return_full_text=False)
        print(out[0]["generated_text"])
        assert isinstance(pipe.model, not_hf.TransplantedForCausalLM)
    """
    done = run_python("-c", textwrap.dedent(script))
    assert done.returncode == 0, done.stderr
    model = TransplantedForCausalLM.from_pretrained(where[1])
    tokenizer = AutoTokenizer.from_pretrained(where[0])
    ids = tokenizer(PROMPT, return_tensors="pt")
    expected = model.generate(**ids, max_new_tokens=6, do_sample=False)[0, 4:]
    assert done.stdout.strip() == tokenizer.decode(expected).strip()
    assert logged(done.stderr) == []


def test_a_pipeline_takes_a_transplanted_model(where, caplog):
    model = TransplantedForCausalLM.from_pretrained(*where)
    pipe = pipeline("text-generation", model=model, tokenizer=AutoTokenizer.from_pretrained(where[0]), device="cpu")
    assert pipe(PROMPT, max_new_tokens=3)[0]["generated_text"].startswith(PROMPT)
    assert "not supported" not in caplog.text


def test_two_organs_are_saved_as_a_composition(where, token_ids, tmp_path):
    model = TransplantedForCausalLM.from_pretrained(*where, donor_name="first")
    model.load_donor(where[1], "second", position=1, mode="replace")
    both = logits(model, token_ids)
    model.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir() if "tokenizer" not in path.name}
    assert names == {"README.md", "config.json", "first", "second"}
    assert len(list(tmp_path.rglob("tokenizer.json"))) == os.path.isdir(where[0])  # once, of a base nobody else has
    again = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert again.active_donors == ["first", "second"]
    assert torch.equal(logits(again, token_ids), both)
    again.delete_donor("first")
    model.set_donor("second")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    model.save_pretrained(tmp_path / "one", selected_donors=["second"])
    assert AutoConfig.from_pretrained(tmp_path / "one").position == 1


@pytest.fixture
def base(base_repo) -> str:
    return base_repo("llama")


@pytest.mark.slow
def test_cutting_and_loading_pin_the_commit_of_the_base(hub, token_ids):
    repo = HfApi().create_repo("me/changing-base").repo_id
    tiny_model("llama", seed=1).push_to_hub(repo)
    first = HfApi().model_info(repo).sha
    donor = DonorModel.from_base(repo, layers=(1, 3))
    assert donor.config.base_revision == first
    donor.push_to_hub("me/pinned-organ")
    before = logits(TransplantedForCausalLM.from_pretrained("me/pinned-organ"), token_ids)
    tiny_model("llama", seed=2).push_to_hub(repo)
    assert HfApi().model_info(repo).sha != first
    assert torch.equal(logits(TransplantedForCausalLM.from_pretrained("me/pinned-organ"), token_ids), before)
    assert DonorModel.from_base(repo, layers=(1, 3), revision=first).config.base_revision == first


@pytest.mark.slow
def test_private_revision_subfolder_and_pull_request(base, token_ids, tmp_path):
    donor = moved(base)
    donor.push_to_hub("me/private-organ", private=True)
    with pytest.raises(OSError, match="private-organ"):
        TransplantedForCausalLM.from_pretrained(base, "me/private-organ", token=False)
    expected = logits(TransplantedForCausalLM.from_pretrained(base, "me/private-organ"), token_ids)
    donor.push_to_hub("me/private-organ", revision="v2", commit_message="second")
    HfApi().create_tag("me/private-organ", tag="release", revision="v2")
    donor.config.domain = "law"
    info = donor.push_to_hub("me/private-organ", create_pr=True)
    assert info.pr_revision == "refs/pr/1"
    HfApi().create_branch("me/private-organ", branch="sub")
    donor.save_pretrained(tmp_path)
    HfApi().upload_folder(repo_id="me/private-organ", folder_path=tmp_path, path_in_repo="organs/kjv", revision="sub")
    forms = [
        {"donor_revision": "v2"},
        {"donor_revision": "release"},
        {"donor_revision": "refs/pr/1"},
        {"donor_revision": "sub", "donor_subfolder": "organs/kjv"},
    ]
    for form in forms:
        model = TransplantedForCausalLM.from_pretrained(base, "me/private-organ", **form)
        assert torch.equal(logits(model, token_ids), expected)
    alone = TransplantedForCausalLM.from_pretrained("me/private-organ", revision="sub", subfolder="organs/kjv")
    assert torch.equal(logits(alone, token_ids), expected)


def test_pushing_again_keeps_what_was_written_by_hand(base):
    moved(base).push_to_hub("me/card-organ", tags=["mine"])
    card = HfApi().hf_hub_download("me/card-organ", "README.md")
    text = Path(card).read_text(encoding="utf-8")
    assert "not-hf" in text and "mine" in text and "base_model: me/tiny-llama" in text
    HfApi().upload_file(
        path_or_fileobj=(text + "\nWritten by hand.\n").encode(), path_in_repo="README.md", repo_id="me/card-organ"
    )
    model = TransplantedForCausalLM.from_pretrained("me/card-organ")
    model.donor_config["default"].domain = "law"
    model.push_to_hub("me/card-organ")
    text = Path(HfApi().hf_hub_download("me/card-organ", "README.md")).read_text(encoding="utf-8")
    assert "Written by hand." in text and "mine" in text
    assert len(HfApi().list_repo_commits("me/card-organ")) == 4  # one per push, besides the initial one


def test_a_push_that_cannot_be_saved_creates_no_repo(base, monkeypatch):
    donor = moved(base)
    monkeypatch.setattr(donor, "state_dict", lambda: {"organ.x": torch.empty(0)})
    with pytest.raises(ValueError, match="empty"):
        donor.push_to_hub("me/never")
    assert not HfApi().repo_exists("me/never")


def test_offline_once_cached(hub, base, token_ids):
    moved(base).push_to_hub("me/cached-organ")
    online = logits(TransplantedForCausalLM.from_pretrained("me/cached-organ"), token_ids)
    hub.requests.clear()
    offline = TransplantedForCausalLM.from_pretrained("me/cached-organ", local_files_only=True)
    assert torch.equal(logits(offline, token_ids), online)
    assert not hub.requests


def test_a_missing_repo_is_an_os_error(base):
    with pytest.raises(OSError, match="me/absent"):
        TransplantedForCausalLM.from_pretrained(base, "me/absent")


def test_auto_class_extras(tmp_path, base_folder, token_ids):
    DonorModel.from_base(base_folder("llama"), (1, 3)).save_pretrained(tmp_path, variant="fp16")
    organ_alone, info = AutoModel.from_pretrained(tmp_path, variant="fp16", output_loading_info=True)
    assert isinstance(organ_alone, DonorModel) and not info["missing_keys"]
    fresh = AutoModelForCausalLM.from_config(organ_alone.config)
    assert isinstance(fresh, TransplantedForCausalLM) and fresh.config.num_hidden_layers == 6
    DonorModel.from_base(base_folder("llama"), (1, 3)).save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, TransplantedForCausalLM) and not info["missing_keys"]
    for given in ({"dtype": torch.float16}, {"config": organ_alone.config}):
        with pytest.raises(TypeError, match=f"unexpected arguments for a live recipient: {next(iter(given))}"):
            TransplantedForCausalLM.from_pretrained(model, tmp_path, **given)
    own = model.unload()
    assert TransplantedForCausalLM.from_pretrained(own, tmp_path, config=own.config) is own
    with pytest.raises(NotHFError, match="is a donor, not a recipient"):
        TransplantedForCausalLM.from_pretrained(tmp_path, tmp_path)


@pytest.mark.parametrize("empty", [init_empty_weights, lambda: torch.device("meta")], ids=["accelerate", "torch"])
def test_an_empty_model_is_made_of_a_config(empty, base_folder):
    """Flows that dispatch or load weights themselves begin so."""
    config = DonorModel.from_base(base_folder("llama"), (1, 3)).config
    with empty():
        model = AutoModelForCausalLM.from_config(config)
    assert isinstance(model, TransplantedForCausalLM) and model.config.num_hidden_layers == 6
    assert all(parameter.is_meta for parameter in model.parameters())
    assert infer_auto_device_map(model, max_memory={"cpu": "1GB"}) == {"": "cpu"}
    with pytest.raises(NotHFError, match=r"has no weights \(meta device\); load them, or give a folder or Hub ID"):
        DonorModel.from_base(model.unload(), (1, 3))
    config.scale = 0.5
    with empty(), pytest.raises(NotHFError, match=r"an empty model .* set_donor_scale\('default', 0\.5\)"):
        AutoModelForCausalLM.from_config(config)


def test_an_empty_model_takes_weights(base_folder, token_ids):
    config = DonorModel.from_base(base_folder("llama"), (1, 3)).config
    full = AutoModelForCausalLM.from_config(config)
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(full.state_dict(), assign=True)
    assert torch.equal(logits(model.eval(), token_ids), logits(full.eval(), token_ids))
    assert type(model.merge_and_unload()) is LlamaForCausalLM


def test_an_empty_recipient_does_not_take_weights(base_folder):
    donor = DonorModel.from_base(base_folder("llama"), (1, 3))
    base = tiny_model("llama").to("meta")
    with pytest.raises(NotHFError, match="recipient's layers have no weights"):
        TransplantedForCausalLM.from_pretrained(base, donor)
