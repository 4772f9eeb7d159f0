"""What transformers, accelerate and their users ask of a model: a transplanted one answers as the native one does."""

from __future__ import annotations

import copy
import inspect
import io
import json

import pytest
import torch
from accelerate import infer_auto_device_map
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, LlamaForCausalLM, Trainer, TrainingArguments
from transformers.utils.generic import can_return_loss, find_labels

from not_hf import DonorModel, TransplantedForCausalLM
from testing.donors import organ, tiny_organ, transplanted
from testing.launching import answer
from testing.models import enable_checkpointing, logits, tiny_model
from testing.processes import prepared_context

MODEL_TYPES = ("gpt2", "llama", "qwen3_moe", "gemma3_text", "opt")
every = pytest.mark.parametrize("model_type", MODEL_TYPES)


def with_organ(model_type: str = "llama", **options) -> TransplantedForCausalLM:
    base = tiny_model(model_type)
    return TransplantedForCausalLM.from_pretrained(base, organ(base, 1), **options)


def off(model) -> list[bool]:
    """Whether gradient checkpointing is on, layer by layer, those outside of the stack included."""
    surgery = model._surgery
    layers = [*surgery.base_layers, *(layer for held in surgery.organs.values() for layer in held.layers)]
    return [layer.gradient_checkpointing for layer in layers]


@every
def test_signatures_are_native(model_type):
    native, model = tiny_model(model_type), with_organ(model_type)
    for name in ("forward", "prepare_inputs_for_generation", "generate", "get_input_embeddings"):
        assert inspect.signature(getattr(model, name)) == inspect.signature(getattr(native, name))
    assert inspect.signature(type(model).forward) == inspect.signature(type(native).forward)
    assert find_labels(type(model)) == find_labels(type(native)) == ["labels"]
    assert can_return_loss(type(model)) == can_return_loss(type(native))
    assert type(model).__name__ == type(native).__name__ and model.config_class is native.config_class


@every
def test_what_a_trainer_inspects_is_native(model_type, tmp_path):
    arguments = TrainingArguments(tmp_path, report_to="none", use_cpu=True)
    found = []
    for model in (tiny_model(model_type), with_organ(model_type, is_trainable=True)):
        trainer = Trainer(model, arguments)
        trainer._set_signature_columns_if_needed()
        found.append((trainer._signature_columns, trainer.label_names, trainer.model_accepts_loss_kwargs))
    assert found[0] == found[1]


@every
def test_flags_and_attributes_are_native(model_type):
    native, model = tiny_model(model_type), with_organ(model_type)
    for name in (
        *("_no_split_modules", "_tied_weights_keys", "_keys_to_ignore_on_load_missing", "main_input_name"),
        *("_supports_sdpa", "_supports_flash_attn", "_supports_attention_backend", "_can_compile_fullgraph"),
        *("base_model_prefix", "supports_gradient_checkpointing", "device", "dtype", "framework", "_is_stateful"),
        *("input_modalities", "_skip_keys_device_placement", "all_tied_weights_keys"),
    ):
        assert getattr(model, name, None) == getattr(native, name, None), name
    assert model.can_generate() and model.base_model is getattr(model, model.base_model_prefix)
    assert model.generation_config.to_dict() == native.generation_config.to_dict()
    assert model.get_input_embeddings().weight.shape == native.get_input_embeddings().weight.shape
    assert not [name for name, _ in model.named_modules() if "surgery" in name or "organ" in name]


@every
def test_state_dicts_have_native_keys_and_go_round(model_type, token_ids):
    model, other = with_organ(model_type), with_organ(model_type)
    native = copy.deepcopy(model).merge_and_unload()
    assert model.state_dict().keys() == native.state_dict().keys()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.zero_()
    assert not any(other.load_state_dict(model.state_dict()))
    assert torch.equal(logits(other, token_ids), logits(model, token_ids))
    assert torch.equal(logits(native, token_ids), logits(model, token_ids))


@every
def test_configs_go_round(model_type, tmp_path):
    model = with_organ(model_type)
    before = model.base_config.to_dict()
    model.config.save_pretrained(tmp_path)
    again = AutoConfig.from_pretrained(tmp_path)
    assert again.num_hidden_layers == 6 == model.config.num_hidden_layers
    skipped = {"_name_or_path", "transformers_version", "architectures", "dtype"}
    ours, theirs = ({k: v for k, v in c.to_dict().items() if k not in skipped} for c in (model.config, again))
    assert json.loads(json.dumps(ours)) == json.loads(json.dumps(theirs))
    assert model.base_config.to_dict() == before and model.base_config.num_hidden_layers == 4


@every
def test_parameters_are_counted_as_in_the_merged_model(model_type):
    model = with_organ(model_type, is_trainable=True)
    merged = copy.deepcopy(model).merge_and_unload()
    assert model.num_parameters() == merged.num_parameters()
    assert model.num_parameters(exclude_embeddings=True) == merged.num_parameters(exclude_embeddings=True)
    assert model.num_parameters(only_trainable=True) == model.get_nb_trainable_parameters()[0]
    assert model.get_memory_footprint() == merged.get_memory_footprint()
    assert infer_auto_device_map(model, {"cpu": 10**9}) == infer_auto_device_map(merged, {"cpu": 10**9})


@every
def test_attention_follows_to_organs_in_and_out_of_the_stack(model_type, token_ids):
    base = tiny_model(model_type)
    model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1), donor_name="a", position=1)
    model.load_donor(organ(tiny_model(model_type), 2), "b", position=2)
    model.set_donor("a")
    before = {name: kept(model, name, token_ids) for name in ("a", "b")}
    model.set_donor("a")
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    for name in ("a", "b"):
        model.set_donor(name)
        configs = [module.config for module in model.modules() if hasattr(module, "config")]
        assert {config._attn_implementation for config in configs} == {"eager"}
        size = float(before[name].abs().max())  # what rounding grows with
        assert torch.allclose(logits(model, token_ids), before[name], atol=1e-5 * size)
    assert model.base_model.config._attn_implementation == "eager"
    assert model.unload().config._attn_implementation == "eager"


def kept(model, name: str, ids: torch.Tensor) -> torch.Tensor:
    model.set_donor(name)
    return logits(model, ids)


def test_gradient_checkpointing_reaches_organs_in_and_out_of_the_stack():
    model = transplanted(("a", organ(tiny_model("llama"), 1), {}), ("b", organ(tiny_model("llama"), 2), {}))
    model.set_donor("a")
    enable_checkpointing(model)
    model.set_donor(["a", "b"])
    assert all(off(model))
    model.load_donor(organ(tiny_model("llama"), 3), "c")
    assert all(off(model))
    model.set_donor("c")
    disable = getattr(model, "activation_checkpointing_disable", None) or model.gradient_checkpointing_disable
    disable()
    model.set_donor(["a", "b", "c"])
    assert not any(off(model))


def test_an_organ_that_checkpointed_alone_does_as_its_neighbours():
    donor = organ(tiny_model("llama"), 1)
    enable_checkpointing(donor)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    assert not any(off(model)) and all(layer.gradient_checkpointing for layer in donor.stack.layers)


@pytest.mark.slow
@every
def test_growing_the_vocabulary_keeps_ties(model_type, token_ids):
    for tied in (True, False):
        base = tiny_model(model_type, tie_word_embeddings=tied)
        model = TransplantedForCausalLM.from_pretrained(base, organ(base, 1))
        before = logits(model, token_ids)
        model.resize_token_embeddings(101, mean_resizing=False)
        assert model.config.vocab_size == 101 and torch.equal(logits(model, token_ids)[..., :96], before)
        merged = model.merge_and_unload()
        same = merged.get_input_embeddings().weight is merged.get_output_embeddings().weight
        assert same is tied and merged.get_output_embeddings().weight.shape[0] == 101


def test_growing_the_vocabulary_of_a_model_with_organs_warns_that_rows_are_not_saved(caplog):
    model = transplanted(("a", tiny_organ(1), {}))
    model.resize_token_embeddings(90, mean_resizing=False)
    assert not caplog.text
    model.resize_token_embeddings(97, mean_resizing=False)
    assert "not saved with organs" in caplog.text


def test_organs_are_saved_in_shards_and_from_a_state_dict(token_ids, tmp_path):
    model = with_organ()
    doubled = {name: 2 * tensor for name, tensor in model.state_dict().items()}
    model.save_pretrained(tmp_path, state_dict=doubled, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 1 and (tmp_path / "model.safetensors.index.json").exists()
    tensors = {name: tensor for shard in shards for name, tensor in load_file(shard).items()}
    again = DonorModel.from_pretrained(tmp_path)
    assert tensors.keys() == again.state_dict().keys()
    name = "model.layers.3.mlp.up_proj.weight"  # the organ's first layer
    assert torch.equal(again.stack.layers[0].mlp.up_proj.weight, doubled[name])
    model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not list((tmp_path / "other").glob("*.safetensors")) and not (tmp_path / "other" / "README.md").exists()


@pytest.mark.parametrize("change", ["half", "bfloat16", "double", "float"])
def test_dtypes_change_as_natively(change):
    model = with_organ()
    getattr(model, change)()
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    model.set_donor([])
    model.float()
    model.set_donor("default")
    assert {p.dtype for p in model.parameters()} == {torch.float32}


def test_a_whole_model_goes_through_torch_save(token_ids):
    model = with_organ()
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    again = torch.load(buffer, weights_only=False)
    assert isinstance(again, TransplantedForCausalLM) and torch.equal(
        logits(again, token_ids), logits(model, token_ids)
    )
    assert type(again.unload()) is LlamaForCausalLM


@pytest.mark.slow
def test_a_model_goes_to_another_process(token_ids):
    model = with_organ()
    context = prepared_context()
    queue = context.Queue()
    process = context.Process(target=answer, args=(model, token_ids, queue))
    process.start()
    with_it, without = queue.get(timeout=120)
    process.join()
    assert torch.equal(torch.from_numpy(with_it), logits(model, token_ids))
    assert torch.equal(torch.from_numpy(without), logits(tiny_model("llama"), token_ids))


def test_inputs_can_require_gradients(token_ids):
    model = with_organ(is_trainable=True)
    model.enable_input_require_grads()
    model(token_ids, labels=token_ids).loss.backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == {
        n for n, p in model.named_parameters() if p.requires_grad
    }
    model.disable_input_require_grads()


def test_loss_arguments_reach_the_native_loss(token_ids):
    model, merged = with_organ(), with_organ().merge_and_unload()
    for options in ({}, {"num_items_in_batch": 5}):
        ours, theirs = (each(token_ids, labels=token_ids, **options).loss for each in (model, merged))
        assert torch.equal(ours, theirs)


def test_what_an_architecture_keeps_frozen_stays_so(token_ids):
    """afmoe's `expert_bias` balances its experts and takes no gradient."""
    config = AutoConfig.for_model(
        "afmoe",
        **{"vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "head_dim": 8},
        **{"num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "num_dense_layers": 1},
        **{"num_experts": 4, "num_experts_per_tok": 2, "num_shared_experts": 1, "global_attn_every_n_layers": 2},
    )
    base = AutoModelForCausalLM.from_config(config)
    frozen = [name for name, parameter in base.named_parameters() if not parameter.requires_grad]
    assert len(frozen) == 3 and all(name.endswith("expert_bias") for name in frozen)
    donor = DonorModel.from_base(base, (2, 4))
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    inside = dict(model.model.layers[4:6].named_parameters())
    assert {name for name, p in inside.items() if not p.requires_grad} == {"0.mlp.expert_bias", "1.mlp.expert_bias"}
    merged = model.merge_and_unload()
    still = [name for name, parameter in merged.named_parameters() if not parameter.requires_grad]
    assert len(still) == 5 and all(name.endswith("expert_bias") for name in still)


def test_unknown_keywords_are_type_errors():
    model = with_organ()
    for donor in (organ(tiny_model("llama"), 2), "me/somewhere"):
        with pytest.raises(TypeError, match="unexpected arguments: adapter_name"):
            model.load_donor(donor, "b", adapter_name="c")
    assert list(model.donor_config) == ["default"]
