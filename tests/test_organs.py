"""The life of organs in a model: loading, choosing, switching off, copying, taking out."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from architectures import tiny_model
from safetensors.torch import load_file
from transformers import LlamaForCausalLM, PreTrainedModel

from not_hf import CorruptDonorError, DonorModel, NotHFError, TransplantedForCausalLM, check_compatibility


@torch.no_grad()
def logits(model, ids):
    return model(ids).logits


def organ(seed: int, layers=(1, 2), model_type: str = "llama", **options) -> DonorModel:
    """An organ unlike any other: cut, then moved at random."""
    donor = DonorModel.from_base(tiny_model(model_type), layers, **options)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return donor


def transplanted(*donors: tuple[str, DonorModel, dict]) -> TransplantedForCausalLM:
    model = tiny_model("llama")
    for name, donor, place in donors:
        model = TransplantedForCausalLM.from_pretrained(model, donor, donor_name=name, **place)
    return model


def by_hand(slots: list) -> PreTrainedModel:
    """A native llama whose layers are put together without not_hf: numbers are the base's own layers."""
    base = tiny_model("llama")
    native = tiny_model("llama", num_hidden_layers=len(slots))
    native.load_state_dict({k: v for k, v in base.state_dict().items() if "layers" not in k}, strict=False)
    for n, slot in enumerate(slots):
        source = base.model.layers[slot] if isinstance(slot, int) else slot
        native.model.layers[n].load_state_dict(source.state_dict())
    return native


A, B, C = organ(1), organ(2, layers=(0, 2)), organ(3)
(a,), (b0, b1), (c,) = (list(donor.stack.layers) for donor in (A, B, C))


@pytest.mark.parametrize(
    ("donors", "expected"),
    [
        ([("a", A, {"position": 0})], [a, 0, 1, 2, 3]),
        ([("a", A, {"position": 4})], [0, 1, 2, 3, a]),
        ([("b", B, {"position": 1, "mode": "replace"})], [0, b0, b1, 3]),
        ([("a", A, {"position": 2}), ("b", B, {"position": 2})], [0, 1, a, b0, b1, 2, 3]),
        ([("b", B, {"position": 2}), ("a", A, {"position": 2})], [0, 1, b0, b1, a, 2, 3]),
        ([("b", B, {"position": 1, "mode": "replace"}), ("a", A, {"position": 4})], [0, b0, b1, 3, a]),
        ([("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"})], [0, a, b0, b1, 3]),
        ([("b", B, {"position": 1, "mode": "replace"}), ("a", A, {"position": 1})], [0, b0, b1, a, 3]),
        ([("b", B, {"position": 0, "mode": "replace"}), ("a", A, {"position": 2, "mode": "replace"})], [b0, b1, a, 3]),
    ],
)
def test_positions_count_the_recipients_own_layers(donors, expected, token_ids):
    model = transplanted(*donors)
    assert model.active_donors == [name for name, _, _ in donors]
    assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(len(expected)))
    assert torch.equal(logits(model, token_ids), logits(by_hand(expected), token_ids))
    native = model.merge_and_unload()
    assert type(native) is LlamaForCausalLM and not isinstance(native, TransplantedForCausalLM)
    assert torch.equal(logits(native, token_ids), logits(by_hand(expected), token_ids))


def test_any_choice_of_organs_is_as_if_the_others_had_never_been_there(token_ids):
    places = {"a": (A, {"position": 1}), "b": (B, {"position": 1, "mode": "replace"}), "c": (C, {"position": 3})}
    model = transplanted(*((name, *place) for name, place in places.items()))
    for chosen in (["a"], ["b", "c"], ["c", "a"], [], ["a", "b", "c"]):
        model.set_donor(chosen)
        assert model.active_donors == sorted(chosen)
        alone = transplanted(*((name, *places[name]) for name in sorted(chosen)))
        assert torch.equal(logits(model, token_ids), logits(alone, token_ids))
        assert model.config.num_hidden_layers == alone.config.num_hidden_layers
    model.delete_donor("b")
    assert torch.equal(
        logits(model, token_ids), logits(transplanted(("a", *places["a"]), ("c", *places["c"])), token_ids)
    )
    with pytest.raises(NotHFError, match="no donor named b; loaded are a, c"):
        model.set_donor("b")
    assert model.active_donors == ["a", "c"]


def test_disabling_nests_and_survives_an_exception(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    with_organ, base = logits(model, token_ids), logits(tiny_model("llama"), token_ids)
    with pytest.raises(KeyError), model.disable_donors():
        with model.disable_donors():
            assert torch.equal(logits(model, token_ids), base)
        assert model.active_donors == [] and torch.equal(logits(model, token_ids), base)
        raise KeyError
    assert model.active_donors == ["a"] and torch.equal(logits(model, token_ids), with_organ)


def test_organs_are_copies_on_both_sides(token_ids):
    live = tiny_model("llama")
    donor = DonorModel.from_base(live, (1, 2))
    with torch.no_grad():
        live.model.layers[1].mlp.up_proj.weight.zero_()
    assert donor.stack.layers[0].mlp.up_proj.weight.abs().sum() > 0
    recipient = tiny_model("llama").to(torch.bfloat16)
    model = TransplantedForCausalLM.from_pretrained(recipient, donor)
    assert model is recipient and {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.dtype for p in donor.parameters()} == {torch.float32}
    assert donor.stack.layers[0].self_attn.config is donor.organ.config


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_are_independent_and_whole(copied, token_ids):
    model = transplanted(("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"}))
    before = logits(model, token_ids)
    twin = copied(model)
    assert isinstance(twin, TransplantedForCausalLM) and isinstance(twin, LlamaForCausalLM)
    assert torch.equal(logits(twin, token_ids), before)
    twin.unload()
    assert torch.equal(logits(twin, token_ids), logits(tiny_model("llama"), token_ids))
    assert torch.equal(logits(model, token_ids), before) and model.active_donors == ["a", "b"]


def test_layers_outside_the_stack_follow_dtype_and_mode(token_ids):
    model = transplanted(("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"}))
    model.set_donor("a")
    model.to(torch.bfloat16).train()
    model.set_donor("b")
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert all(module.training for module in model.modules())
    model.eval()
    with model.disable_donors():
        expected = logits(tiny_model("llama").to(torch.bfloat16), token_ids)
        assert torch.equal(logits(model, token_ids), expected)


def test_hidden_states_and_attentions_follow_every_change(token_ids):
    model = tiny_model("llama", attn_implementation="eager")
    model.set_attn_implementation("eager")

    def counts(model):
        out = model(token_ids, output_hidden_states=True, output_attentions=True)
        return len(out.hidden_states), len(out.attentions)

    assert counts(model) == (5, 4)
    model = TransplantedForCausalLM.from_pretrained(model, B, position=2)
    assert counts(model) == (7, 6)
    with model.disable_donors():
        assert counts(model) == (5, 4)
    assert counts(model) == (7, 6)
    assert counts(model.unload()) == (5, 4)


def test_what_a_model_derives_from_its_layer_types_is_kept_in_step(token_ids):
    """qwen3 builds sliding masks only where `has_sliding_layers`, which its constructor sets."""
    window = {"use_sliding_window": True, "sliding_window": 6}
    base = tiny_model("qwen3", **window, layer_types=["full_attention"] * 4)
    assert base.model.has_sliding_layers is False
    before = logits(base, token_ids)
    sliding = DonorModel.from_base(tiny_model("qwen3", **window, layer_types=["sliding_attention"] * 4), (0, 1))
    model = TransplantedForCausalLM.from_pretrained(base, sliding)
    model.load_donor(organ(5, model_type="qwen3", layers=(0, 1)), "other", position=4)
    assert model.model.has_sliding_layers is True
    assert model.config.layer_types.count("sliding_attention") == 1
    model.set_donor("other")
    assert model.model.has_sliding_layers is False
    model.set_donor("default")
    assert model.model.has_sliding_layers is True
    assert generate_cached_equals_uncached(model, token_ids)
    assert torch.equal(logits(model.unload(), token_ids), before)
    assert base.model.has_sliding_layers is False


def generate_cached_equals_uncached(model, ids):
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 8, "do_sample": False}
    return torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


@pytest.mark.parametrize("is_trainable", [False, True])
def test_only_a_trainable_organ_is_trainable_and_flags_come_back(is_trainable, capsys):
    base = tiny_model("llama")
    base.lm_head.weight.requires_grad_(False)
    flags = {name: p.requires_grad for name, p in base.named_parameters()}
    model = TransplantedForCausalLM.from_pretrained(base, A, is_trainable=is_trainable)
    trainable, total = model.get_nb_trainable_parameters()
    assert trainable == (A.num_parameters() if is_trainable else 0)
    assert total == sum(p.numel() for p in model.parameters())
    model.print_trainable_parameters()
    assert capsys.readouterr().out.startswith(f"trainable params: {trainable:,d} || all params: {total:,d} || ")
    assert {name: p.requires_grad for name, p in model.unload().named_parameters()} == flags


def test_get_base_model_is_a_handle_of_the_native_class(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    base = model.get_base_model()
    assert type(base) is LlamaForCausalLM
    assert torch.equal(logits(base, token_ids), logits(model, token_ids))
    with model.disable_donors():
        assert torch.equal(logits(base, token_ids), logits(tiny_model("llama"), token_ids))


def test_growing_the_vocabulary_survives_unloading(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    model.resize_token_embeddings(100, mean_resizing=False)
    native = model.unload()
    assert native.config.vocab_size == 100 == native.get_output_embeddings().weight.shape[0]
    assert torch.equal(logits(native, token_ids)[..., :96], logits(tiny_model("llama"), token_ids))


def test_cutting_from_a_model_with_organs_is_refused():
    with pytest.raises(NotHFError, match="carries organs"):
        DonorModel.from_base(transplanted(("a", A, {})), (0, 1))


def test_an_organ_grows_out_of_its_config_alone(token_ids):
    """`DonorModel(config)` is a fresh, untrained organ, as for any model of transformers."""
    fresh = DonorModel(copy.deepcopy(A.config))
    assert fresh.state_dict().keys() == A.state_dict().keys()
    assert fresh(inputs_embeds=torch.randn(1, 3, 32)).last_hidden_state.shape == (1, 3, 32)


def test_an_organ_that_was_run_alone_records_its_states_once(token_ids):
    donor = copy.deepcopy(A)
    donor(inputs_embeds=torch.randn(1, 3, 32), output_hidden_states=True)
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor)
    assert len(model(token_ids, output_hidden_states=True).hidden_states) == 6


def test_compatibility_counts_the_own_layers_of_a_transplanted_recipient():
    model = transplanted(("b", B, {}))
    assert model.config.num_hidden_layers == 6 and model.base_config.num_hidden_layers == 4
    assert check_compatibility(A, model, position=4) == []
    assert "between 0 and 4" in check_compatibility(A, model, position=5)[0]


def test_shards_of_an_organ_load_one_by_one(token_ids, tmp_path):
    """As `Trainer` does on resuming from a sharded checkpoint."""
    model = transplanted(("b", B, {}))
    model.save_pretrained(tmp_path, max_shard_size="10KB")
    shards = sorted(tmp_path.glob("*.safetensors"))
    assert len(shards) > 1
    expected = logits(model, token_ids)
    other = transplanted(("b", DonorModel.from_base(tiny_model("llama"), (0, 2)), {}))
    for shard in shards:
        other.load_state_dict(load_file(shard), strict=False)
    assert torch.equal(logits(other, token_ids), expected)
    with pytest.raises(CorruptDonorError, match="missing"):
        other.load_state_dict(load_file(shards[0]))
