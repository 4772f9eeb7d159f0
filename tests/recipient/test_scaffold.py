"""An organ trained alone between the base's embeddings and head: `scaffold="minimal"`."""

from __future__ import annotations

import copy
import functools
import json
import pickle
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from huggingface_hub import HfApi, constants
from transformers import (
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    FineGrainedFP8Config,
    Mxfp4Config,
    PreTrainedModel,
    Trainer,
    TrainingArguments,
)

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    TransplantedForMaskedLM,
    UnsupportedArchitectureError,
    perplexity,
)
from not_hf.architecture.quantization import is_quantized
from not_hf.architecture.splicing import spliced_config
from not_hf.architecture.stack import find_stack, head_class, is_encoder
from not_hf.training.trainer import DonorTrainer
from testing.checkpoints import write_fp8, write_mxfp4
from testing.donors import organ, same, scaled_by_hand
from testing.models import CHECKPOINTING, tiny_config, tiny_model, tiny_tokenizer
from testing.models import exact_logits as logits
from testing.releases import dequantizes_fp8
from testing.shapes import ARCHITECTURES, ENCODERS, broadly

T = TransplantedForCausalLM.from_pretrained
GENERATE = {"do_sample": False, "max_new_tokens": 6}
PLAIN = [model_type for model_type in ENCODERS if model_type != "modernbert"]  # whose first layer is like the others

UNCOUNTED = ("jamba", "minimax")  # layers 1 and 2 alone have no attention, or not first: their cache would not count


def scaffold(base, donor=None, **options):
    return T(base, donor, scaffold="minimal", **options)


def outside(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """A native model's tensors without those of its layers."""
    layers = find_stack(model).full_path
    return {key: tensor for key, tensor in model.state_dict().items() if not key.startswith(f"{layers}.")}


def by_hand(base: PreTrainedModel, *donors: DonorModel) -> PreTrainedModel:
    """A native model of the organs' layers alone, with the base's embeddings and head."""
    slots = [(donor.config.native_config(), n) for donor in donors for n in range(donor.config.num_organ_layers)]
    native = type(base)._from_config(spliced_config(base.config, slots), dtype=base.dtype)
    layers = [layer for donor in donors for layer in donor.stack.layers]
    path = find_stack(native).full_path
    inside = {f"{path}.{n}.{key}": t for n, layer in enumerate(layers) for key, t in layer.state_dict().items()}
    native.load_state_dict({**outside(base), **inside})
    if native.can_generate():
        native.generation_config = base.generation_config
    return native.eval()


@broadly((*ARCHITECTURES, *PLAIN))
def test_it_is_the_native_model_of_the_organ_alone(model_type, tmp_path, token_ids):
    tiny_model(model_type).save_pretrained(tmp_path)
    base = head_class(tiny_config(model_type)).from_pretrained(tmp_path)
    donor = organ(tmp_path, 1)
    kind = TransplantedForMaskedLM if is_encoder(base.config) else TransplantedForCausalLM
    if model_type in UNCOUNTED:
        with pytest.raises(UnsupportedArchitectureError, match="needs an attention layer"):
            kind.from_pretrained(tmp_path, donor, scaffold="minimal")
        return
    model = kind.from_pretrained(tmp_path, donor, scaffold="minimal")
    expected = by_hand(base, donor)
    assert isinstance(model, type(base)) and type(model).__name__ == type(base).__name__
    assert model.num_parameters() == expected.num_parameters() < base.num_parameters()
    assert [model._surgery.base_layers, list(model._surgery.parked(model))] == [[], []]
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))
    options = {**GENERATE, "attention_mask": torch.ones_like(token_ids)}
    if model.can_generate():
        tokens = expected.generate(token_ids, **options)
        assert torch.equal(model.generate(token_ids, **options), tokens)
        assert torch.equal(model.generate(token_ids, use_cache=False, **options), tokens)

    find_stack(base).layers._modules.clear()
    with model.disable_donors():  # embeddings and head
        assert model.config.to_dict() == base.config.to_dict()
        assert torch.equal(logits(model, token_ids), logits(base, token_ids))
        if model.can_generate():
            assert torch.equal(model.generate(token_ids, **options), base.generate(token_ids, **options))
    assert torch.equal(logits(model, token_ids), logits(expected, token_ids))


def test_what_is_left_is_that_of_the_base(base_folder, token_ids):
    """Layers whose make depends on their number: ModernBERT's organ keeps that of its place in the base."""
    base = AutoModelForMaskedLM.from_pretrained(base_folder("modernbert"))
    donor = organ(base, 1)
    model = TransplantedForMaskedLM.from_pretrained(base_folder("modernbert"), donor, scaffold="minimal")
    with torch.no_grad():
        out = model(token_ids, output_hidden_states=True)
        entry = base.model.embeddings(token_ids)
        assert torch.equal(out.hidden_states[0], entry)
        leaves = donor(inputs_embeds=entry).last_hidden_state
        assert torch.equal(out.logits, base.decoder(base.head(base.model.final_norm(leaves))))


# -------------------------------------------------------------- training, saving


def trainer(model, blocks: Dataset, folder: Path, cls=Trainer, **options) -> Trainer:
    fixed = {"per_device_train_batch_size": 4, "learning_rate": 1e-2, "logging_steps": 1, "save_steps": 4}
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True}
    arguments = TrainingArguments(str(folder), **{"max_steps": 8, **fixed, **quiet, **options})
    return cls(model=model, args=arguments, train_dataset=blocks, processing_class=tiny_tokenizer())


@pytest.mark.slow
@pytest.mark.parametrize("model_type", ["gpt2", "llama", "gemma2", "qwen3_moe", "opt", "bloom", "gpt_neo"])
def test_what_was_trained_alone_goes_into_the_whole_base(model_type, blocks, base_folder, tmp_path, token_ids):
    folder = base_folder(model_type)
    donor = DonorModel.from_base(folder, (1, 3), mode="replace")
    model = scaffold(folder, donor, is_trainable=True)
    assert model.get_nb_trainable_parameters()[0] == donor.num_parameters()
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    run = trainer(model, blocks, tmp_path, save_strategy="no")
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.1
    assert all(torch.equal(p, frozen[name]) for name, p in model.named_parameters() if name in frozen)

    model.save_pretrained(tmp_path / "organ")
    whole = AutoModelForCausalLM.from_pretrained(tmp_path / "organ")
    assert whole.config.num_hidden_layers == 4 and whole.config.name_or_path == str(folder)
    expected = AutoModelForCausalLM.from_pretrained(folder)
    for n, layer in enumerate(find_stack(model).layers):
        find_stack(expected).layers[1 + n].load_state_dict(layer.state_dict())
    assert torch.equal(logits(whole, token_ids), logits(expected, token_ids))


@pytest.mark.slow
def test_resuming_and_recomputing_change_nothing(blocks, base_folder, tmp_path):
    def fresh() -> TransplantedForCausalLM:
        return scaffold(base_folder("llama"), DonorModel.from_base(base_folder("llama"), (1, 3)), is_trainable=True)

    whole, resumed, recomputed = fresh(), fresh(), fresh()
    trainer(whole, blocks, tmp_path).train()
    trainer(resumed, blocks, tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    trainer(recomputed, blocks, tmp_path, **{CHECKPOINTING: True, "save_strategy": "no"}).train()
    assert same(whole, resumed) and same(whole, recomputed) and not same(whole, fresh())


@pytest.mark.slow
def test_donor_trainer_gives_what_trainer_gives(blocks, base_folder, tmp_path):
    donor = DonorModel.from_base(base_folder("llama"), (1, 3))
    ours, theirs = (scaffold(base_folder("llama"), donor, is_trainable=True) for _ in range(2))
    trainer(ours, blocks, tmp_path, DonorTrainer, save_strategy="no").train()
    trainer(theirs, blocks, tmp_path, save_strategy="no").train()
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(mine, other)
    with pytest.raises(NotHFError, match="but the first layer is trainable"):
        trainer(ours, blocks, tmp_path, functools.partial(DonorTrainer, cache_prefix=True)).train()
    with pytest.raises(NotHFError, match="needs a model with organs and layers of its own"):
        trainer(ours, blocks, tmp_path, functools.partial(DonorTrainer, kl_weight=1.0))


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("where", ["folder", "repo"])
def test_what_is_saved_is_what_training_in_the_recipient_saves(where, mode, base_folder, base_repo, tmp_path):
    base = base_folder("llama") if where == "folder" else base_repo("llama")
    donor = organ(base, 1, mode=mode)
    for name, model in {"whole": T(base, donor), "alone": scaffold(base, donor)}.items():
        model.donor_config["default"].metrics = {"domain_perplexity": {"before": 2.0, "after": 1.0}}
        model.save_pretrained(tmp_path / name)
    whole, alone = (
        {path.relative_to(tmp_path / name): path.read_bytes() for path in (tmp_path / name).rglob("*")}
        for name in ("whole", "alone")
    )
    assert whole == alone and len(whole) >= 3
    config = json.loads((tmp_path / "alone" / "config.json").read_text())
    assert config["base_model_name_or_path"] == str(base) and config["base_config"]["num_hidden_layers"] == 4
    assert (config["position"], config["mode"], config["layers"]) == (3 if mode == "insert" else 1, mode, [1, 3])
    assert (config["base_revision"] is None) is (where == "folder")


def test_a_pushed_organ_is_trained_on(base_repo, tmp_path, token_ids):
    """From the donor's ID alone, through the Auto class, and pushed back."""
    donor = organ(base_repo("llama"), 1, mode="replace")
    donor.push_to_hub("me/scaffold-organ")
    model = AutoModelForCausalLM.from_pretrained("me/scaffold-organ", scaffold="minimal", is_trainable=True)
    assert model.config.num_hidden_layers == 2 and model.base_config.num_hidden_layers == 4
    model(token_ids, labels=token_ids).loss.backward()
    torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1).step()
    model.push_to_hub("me/scaffold-organ")
    again = scaffold("me/scaffold-organ", position=2)
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert again.donor_config["default"].position == 2
    assert DonorModel.from_pretrained("me/scaffold-organ").config.position == 1


# -------------------------------------------------------------- what is read and held


@pytest.fixture
def empty_caches(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_ASSETS_CACHE", str(tmp_path / "assets"))


@pytest.mark.slow
@pytest.mark.parametrize("shard", ["5GB", "2MB"])
def test_only_embeddings_head_and_organ_are_served(shard, hub, empty_caches, tmp_path, token_ids):
    wide = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 32, "num_hidden_layers": 8}
    base = tiny_model("llama", **wide)
    base.generation_config.max_new_tokens = 3
    base.save_pretrained(tmp_path / "base", max_shard_size=shard)
    repo = HfApi().create_repo(f"me/scaffold-{shard}").repo_id
    HfApi().upload_folder(repo_id=repo, folder_path=tmp_path / "base", path_in_repo="inner")
    organ(base, 1, layers=(3, 5)).save_pretrained(tmp_path / "organ")

    hub.requests.clear()
    model = scaffold(repo, tmp_path / "organ", subfolder="inner")
    ranges = [r for r in hub.requests if r.method == "GET" and r.path.startswith("/lfs/")]
    headers = [r for r in ranges if r.range.startswith(("bytes=0-7", "bytes=8-"))]
    served = sum(r.bytes for r in ranges) - sum(r.bytes for r in headers)
    wanted = sum(tensor.nbytes for tensor in outside(base).values())
    assert wanted <= served <= 1.02 * wanted < 0.05 * sum(t.nbytes for t in base.state_dict().values())
    assert model.generation_config.max_new_tokens == 3  # of the repo's generation_config.json
    assert not any("adapter_config" in r.path for r in hub.requests)

    hub.requests.clear()
    again = scaffold(repo, tmp_path / "organ", subfolder="inner")
    assert not [r for r in hub.requests if r.path.startswith("/lfs/")] and same(model, again)
    model.save_pretrained(tmp_path / "saved")
    config = DonorModel.from_pretrained(tmp_path / "saved").config
    assert (config.base_model_name_or_path, config.base_subfolder) == (repo, "inner")
    assert config.base_revision == HfApi().model_info(repo).sha


def test_other_layers_are_not_read(base_folder, tmp_path, token_ids):
    """They may even be damaged: nobody looks at them."""
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    donor = organ(base, 1)
    expected = by_hand(base, donor)
    with torch.no_grad():
        for parameter in base.model.layers.parameters():
            parameter.fill_(torch.nan)
    base.save_pretrained(tmp_path)
    assert torch.equal(logits(scaffold(tmp_path, donor), token_ids), logits(expected, token_ids))


def test_arguments_of_the_recipient_count(base_folder):
    folder = base_folder("gpt2")
    options = {"dtype": torch.bfloat16, "attn_implementation": "eager", "use_cache": False, "device_map": "cpu"}
    model, info = scaffold(folder, organ(folder, 1), output_loading_info=True, **options)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model.config.use_cache is False and model.config._attn_implementation == "eager"
    assert model.name_or_path == model.config.name_or_path == str(folder)


def test_a_checkpoint_without_prefix_and_dtype(tmp_path, token_ids):
    """As gpt2's own: names begin below the base model, and the config says no dtype."""
    base = tiny_model("gpt2").half()
    base.transformer.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    del config["dtype"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    donor = organ(base, 1)
    model = scaffold(tmp_path, donor)
    assert model.dtype == torch.float16
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, donor), token_ids))


@pytest.mark.parametrize(
    "write, dequantization",
    [
        (write_mxfp4, Mxfp4Config(dequantize=True)),
        pytest.param(write_fp8, FineGrainedFP8Config(dequantize=True), marks=dequantizes_fp8),
    ],
)
def test_a_base_that_transformers_dequantizes(write, dequantization, tmp_path, token_ids):
    folder = write(tmp_path)
    donor = DonorModel.from_base(folder, (1, 3))
    base = AutoModelForCausalLM.from_pretrained(folder, quantization_config=dequantization)
    model = scaffold(folder, donor)
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, donor), token_ids))
    assert not is_quantized(model)


# -------------------------------------------------------------- the life of organs in it


def test_several_organs_stand_in_the_order_of_their_positions(base_folder, token_ids):
    base = AutoModelForCausalLM.from_pretrained(base_folder("qwen3_moe"))
    first, second = organ(base, 1, position=3), organ(base, 2, layers=(0, 1), mode="replace")
    model = scaffold(base_folder("qwen3_moe"), first, donor_name="first")
    model.load_donor(second, "second")
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, second, first), token_ids))
    assert [status.layers for status in model.get_donor_status().values()] == [[1, 2], [0]]
    model.set_donor("second")
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, second), token_ids))
    model.set_donor(["first", "second"])
    with pytest.raises(IncompatibleDonorError, match=r"layers \[0\] are already replaced by organ 'second'"):
        model.load_donor(second, "third")
    model.delete_donor("first")
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, second), token_ids))


@pytest.mark.slow
def test_copies_swaps_scales_and_dtypes(base_folder, token_ids, tmp_path):
    base, folder = AutoModelForCausalLM.from_pretrained(base_folder("llama")), base_folder("llama")
    donor, other = organ(base, 1), organ(base, 2)
    donor.config.scale = 0.5
    model = scaffold(folder, donor)
    half = logits(by_hand(base, scaled_by_hand(donor, 0.5)), token_ids)
    for twin in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(logits(twin, token_ids), half)
        with twin.disable_donors():
            twin.set_donor_scale("default", 1)
        assert torch.equal(logits(twin, token_ids), logits(by_hand(base, donor), token_ids))
    model.hotswap_donor("default", other)
    model.set_donor([])
    model.to(torch.bfloat16)
    model.set_donor("default")
    assert torch.equal(logits(model, token_ids), logits(by_hand(base, other).bfloat16(), token_ids))


def test_perplexity_is_that_of_the_native_model(base_folder):
    base = AutoModelForCausalLM.from_pretrained(base_folder("llama"))
    donor = organ(base, 1)
    models = scaffold(base_folder("llama"), donor), by_hand(base, donor)
    texts = {"predictions": ["w5 w6 w7 w8 w9"], "tokenizer": tiny_tokenizer()}
    ours, theirs = (perplexity.compute(model=model, **texts)["perplexity"] for model in models)
    assert ours == theirs


# -------------------------------------------------------------- what makes no sense


@pytest.mark.parametrize("operation", ["merge_and_unload", "unload"])
def test_there_is_no_base_to_give_back(operation, base_folder, token_ids):
    model = scaffold(base_folder("llama"), organ(base_folder("llama"), 1))
    before = logits(model, token_ids)
    with pytest.raises(NotHFError, match=rf"^{operation}\(\) needs the base's own layers, .* load it into the whole"):
        getattr(model, operation)()
    assert torch.equal(logits(model, token_ids), before) and model.active_donors == ["default"]


def test_a_live_recipient_has_its_layers(token_ids):
    base = tiny_model("llama")
    before = logits(base, token_ids)
    with pytest.raises(NotHFError, match=r"this recipient is live; name its folder or Hub ID$"):
        scaffold(base, organ(base, 1))
    assert type(base).__name__ == "LlamaForCausalLM" and not isinstance(base, TransplantedForCausalLM)
    assert torch.equal(logits(base, token_ids), before)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"scaffold": "none"}, r"^scaffold must be 'full' or 'minimal', got 'none'$"),
        ({"gguf_file": "m.gguf"}, r"^scaffold='minimal' reads parts of safetensors files; leave out gguf_file$"),
        ({"variant": "fp16"}, r"leave out variant$"),
        ({"position": 9}, r"cannot insert 2 layers at position 9 of 4"),
    ],
)
def test_wrong_arguments(options, message, base_folder):
    donor = organ(base_folder("llama"), 1)
    with pytest.raises(NotHFError, match=message):
        T(base_folder("llama"), donor, **{"scaffold": "minimal", **options})


def test_a_base_that_is_quantized_for_good(tmp_path):
    donor = organ(tiny_model("llama"), 1)
    config = tiny_config("llama")
    config.quantization_config = {"quant_method": "gptq", "bits": 4}
    config.save_pretrained(tmp_path)
    with pytest.raises(UnsupportedArchitectureError, match="is quantized; dequantize it first"):
        scaffold(tmp_path, donor)
