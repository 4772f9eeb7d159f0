"""The life of organs in a model: loading, choosing, switching off, copying, taking out."""

from __future__ import annotations

import copy
import json
import pickle
from collections import deque

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaForCausalLM,
    PreTrainedModel,
)

from not_hf import (
    CorruptDonorError,
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    check_compatibility,
)
from not_hf.architecture.twin import build
from not_hf.recipient import surgery
from testing import tree
from testing.donors import tiny_organ, transplanted
from testing.models import ARCHITECTURES, logits, tiny_model


def by_hand(slots: list) -> PreTrainedModel:
    """A native llama whose layers are put together without not_hf: numbers are the base's own layers."""
    base = tiny_model("llama")
    native = tiny_model("llama", num_hidden_layers=len(slots))
    native.load_state_dict({k: v for k, v in base.state_dict().items() if "layers" not in k}, strict=False)
    for n, slot in enumerate(slots):
        source = base.model.layers[slot] if isinstance(slot, int) else slot
        native.model.layers[n].load_state_dict(source.state_dict())
    return native


A, B, C = tiny_organ(1, layers=(1, 2)), tiny_organ(2, layers=(0, 2)), tiny_organ(3, layers=(1, 2))
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
    with pytest.raises(NotHFError, match="no organ named b; loaded organs: a, c"):
        model.set_donor("b")
    assert model.active_donors == ["a", "c"]


@pytest.mark.parametrize("nothing", [None, [None], 3])
def test_what_names_no_organ_is_refused(nothing, tmp_path):
    model = transplanted(("a", A, {}), ("b", B, {}))
    for refuses in (model.set_donor, model.delete_donor):
        with pytest.raises((NotHFError, TypeError)):
            refuses(nothing)
    assert model.active_donors == ["a", "b"]
    for save in (model.save_pretrained, model.push_to_hub):
        with pytest.raises(NotHFError, match="no organ is loaded or selected"):
            save(str(tmp_path / "new"), selected_donors=[])
    assert not (tmp_path / "new").exists()


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
    model.load_donor(tiny_organ(5, "qwen3", (0, 1)), "other", position=4)
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


# What a review tried in order to break it.


def test_unloading_merging_and_loading_inside_disable_donors(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    with model.disable_donors():
        model.load_donor(B, "b", position=2, mode="replace")
        assert model.active_donors == [] and len(model.model.layers) == 4
        with pytest.raises(IncompatibleDonorError, match="already replaced"):
            model.load_donor(B, "c", position=2, mode="replace")
    assert model.active_donors == ["a", "b"]
    expected = logits(model, token_ids)
    with model.disable_donors():
        native = model.merge_and_unload()
    assert type(native) is LlamaForCausalLM and torch.equal(logits(native, token_ids), expected)
    model = transplanted(("a", A, {"position": 1}))
    with model.disable_donors():
        native = model.unload()
    assert type(native) is LlamaForCausalLM
    assert torch.equal(logits(native, token_ids), logits(tiny_model("llama"), token_ids))


def test_a_name_can_be_used_again_for_an_organ_of_another_kind(token_ids):
    window = {"use_sliding_window": True, "sliding_window": 6}
    full, sliding = (
        DonorModel.from_base(tiny_model("qwen3", **window, layer_types=[kind] * 4), (0, 1))
        for kind in ("full_attention", "sliding_attention")
    )
    model = tiny_model("qwen3", **window, layer_types=["full_attention"] * 4)
    model = TransplantedForCausalLM.from_pretrained(model, full, donor_name="x", position=2)
    model.delete_donor("x")
    model.load_donor(sliding, "x", position=2)
    assert model.model.has_sliding_layers is True
    assert logits(model, token_ids).isfinite().all()


def test_a_composition_keeps_order_and_what_is_active(token_ids, tmp_path, base_folder):
    base = base_folder("llama")
    a, b = (tiny_organ(seed) for seed in (1, 2))
    model = TransplantedForCausalLM.from_pretrained(base, a, donor_name="a", position=1)
    model.load_donor(b, "b", position=1)
    model.save_pretrained(tmp_path / "both", selected_donors=["b", "a"])
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "both")
    assert again.active_donors == ["a", "b"]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))

    model = TransplantedForCausalLM.from_pretrained(base, a, donor_name="a", position=1, mode="replace")
    model.set_donor([])
    model.load_donor(b, "b", position=1, mode="replace")  # where a would be
    model.save_pretrained(tmp_path / "one-active")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "one-active")
    assert again.active_donors == ["b"] and list(again.donor_config) == ["a", "b"]
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))


def test_saving_over_one_organ_leaves_no_stale_weights(tmp_path):
    model = transplanted(("a", A, {}))
    model.save_pretrained(tmp_path)
    model.load_donor(C, "c")
    model.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["README.md", "a", "c", "config.json"]


@pytest.mark.parametrize("layers", [np.array([1, 3]), (np.int64(1), np.int64(3)), range(1, 3), [1, 3]])
def test_spans_and_positions_may_be_any_integers(layers):
    donor = DonorModel.from_base(tiny_model("llama"), layers, position=np.int64(0))
    assert donor.config.layers == [1, 3] and len(donor.stack.layers) == 2
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), donor, position=np.int32(4))
    assert model.donor_config["default"].position == 4
    json.loads(model.donor_config["default"].to_json_string())


@pytest.mark.parametrize("value", [float("nan"), 1e6])
def test_values_that_the_recipients_dtype_cannot_hold_are_refused(value, token_ids):
    donor = copy.deepcopy(A)
    donor.stack.layers[0].mlp.up_proj.weight.data[0, 0] = value
    model = tiny_model("llama").half()
    before = logits(model, token_ids)
    with pytest.raises(CorruptDonorError, match=r"non-finite values in layer 0 mlp.up_proj.weight as torch.float16"):
        TransplantedForCausalLM.from_pretrained(model, donor)
    assert type(model) is LlamaForCausalLM and torch.equal(logits(model, token_ids), before)


def test_values_from_a_file_are_checked_again_in_the_dtypes_they_end_up_in(tmp_path):
    """A file is read in one dtype; where the recipient has others, what was finite need not stay so."""
    donor = copy.deepcopy(A)
    donor.stack.layers[0].mlp.up_proj.weight.data[0, 0] = 1e6
    donor.save_pretrained(tmp_path)
    model = tiny_model("llama").half()
    for layer in model.model.layers:
        layer.self_attn.float()
    with pytest.raises(CorruptDonorError, match=r"non-finite values in layer 0 mlp.up_proj.weight as torch.float16"):
        TransplantedForCausalLM.from_pretrained(model, tmp_path)
    assert type(model) is LlamaForCausalLM


def test_a_load_reads_each_tensor_of_an_organ_once_and_builds_two_twins(tmp_path, monkeypatch):
    """What a load costs beside its layers: base and spliced model on the meta device, one look at each value."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    DonorModel.from_base(tmp_path / "base", (1, 3)).save_pretrained(tmp_path / "organ")
    twins, read = [], []
    aminmax = torch.aminmax
    monkeypatch.setattr("not_hf.architecture.twin._twins", deque(maxlen=4))
    monkeypatch.setattr(
        "not_hf.architecture.twin.build", lambda make, config: twins.append(config) or build(make, config)
    )
    monkeypatch.setattr(torch, "aminmax", lambda tensor: read.append(tensor) or aminmax(tensor))
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "base", tmp_path / "organ")
    assert sorted(config.num_hidden_layers for config in twins) == [4, 6]
    assert len(read) == sum(1 for layer in model.model.layers[3:5] for _ in layer.parameters())


def test_an_organ_is_sharded_by_its_own_size_wherever_it_was_cut(tmp_path):
    """Tensors that are mapped from a file of the base do not weigh as much as that file."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    donor = DonorModel.from_base(tmp_path / "base", (2, 4))
    size = sum(parameter.numel() * parameter.element_size() for parameter in donor.parameters())
    for limit, whole in ((size, True), (size // 2, False)):
        donor.save_pretrained(tmp_path / f"{limit}", max_shard_size=limit)
        assert (tmp_path / f"{limit}" / "model.safetensors").exists() == whole


def test_an_organ_is_saved_with_the_recipient_it_was_used_in(token_ids, tmp_path):
    for seed, name in enumerate(("cut-from", "used-in")):
        tiny_model("llama", seed=seed).save_pretrained(tmp_path / name)
    donor = DonorModel.from_base(tmp_path / "cut-from", (1, 3))
    model = TransplantedForCausalLM.from_pretrained(tmp_path / "used-in", donor)
    model.save_pretrained(tmp_path / "organ")
    again = TransplantedForCausalLM.from_pretrained(tmp_path / "organ")
    assert torch.equal(logits(again, token_ids), logits(model, token_ids))
    assert donor.config.base_model_name_or_path == str(tmp_path / "cut-from")


@pytest.mark.parametrize("step", ["set_layer_index", "forget_capture_hooks", "splice_config"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_change_that_breaks_off_midway_is_undone(step, error, token_ids, monkeypatch):
    model = transplanted(("a", A, {"position": 1}), ("b", B, {"position": 1, "mode": "replace"}))
    model.set_donor("a")
    before, config = logits(model, token_ids), model.config.to_dict()
    real = getattr(surgery, step)

    def breaks_once(*args):
        monkeypatch.setattr(surgery, step, real)
        raise error

    for change in (lambda: model.set_donor("b"), lambda: model.load_donor(C, "c"), lambda: model.delete_donor("a")):
        monkeypatch.setattr(surgery, step, breaks_once)
        with pytest.raises(error):
            change()
        assert model.active_donors == ["a"] and list(model.donor_config) == ["a", "b"]
        assert model.config.to_dict() == config and torch.equal(logits(model, token_ids), before)
        assert [layer.self_attn.layer_idx for layer in model.model.layers] == list(range(5))


def test_layers_that_know_their_place_work_where_they_were_cut(token_ids):
    """gpt2 can scale attention by the layer's number; diffllama has a lambda that depends on it."""
    diffllama = AutoModelForCausalLM.from_config(
        AutoConfig.for_model("diffllama", **{**ARCHITECTURES["llama"], "vocab_size": 96, "pad_token_id": 0})
    ).eval()
    for base in (tiny_model("gpt2", scale_attn_by_inverse_layer_idx=True), diffllama):
        before = logits(base, token_ids)
        donor = DonorModel.from_base(base, (1, 3), mode="replace")
        with torch.no_grad():
            hidden = base(token_ids, output_hidden_states=True, use_cache=False).hidden_states
            assert torch.equal(donor(inputs_embeds=hidden[1]).last_hidden_state, hidden[3])
        model = TransplantedForCausalLM.from_pretrained(base, donor)
        assert torch.equal(logits(model, token_ids), before)


def test_an_organ_alone_uses_the_attention_of_its_live_base(token_ids):
    base = tiny_model("llama")
    base.set_attn_implementation("eager")
    donor = DonorModel.from_base(base, (1, 3))
    assert donor.organ.config._attn_implementation == "eager"


def test_old_checkpoints_with_buffers_can_be_cut(tmp_path):
    """The Hub's gpt-neo checkpoints hold attention masks that today's class has no use for."""
    tiny_model("gpt_neo").save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for n in range(4):
        tensors[f"transformer.h.{n}.attn.attention.masked_bias"] = torch.tensor(-1e9)
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    old, live = DonorModel.from_base(tmp_path, (1, 3)), DonorModel.from_base(tiny_model("gpt_neo"), (1, 3))
    assert all(torch.equal(a, b) for a, b in zip(old.parameters(), live.parameters(), strict=True))


def test_lora_on_top_of_an_organ(token_ids, tmp_path):
    model = transplanted(("a", A, {"position": 1}))
    before = logits(model, token_ids)
    lora = get_peft_model(model, LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    assert not torch.equal(logits(lora, token_ids), before)
    with pytest.raises(NotHFError, match="not its own"):
        model.save_pretrained(tmp_path / "organ")
    assert not (tmp_path / "organ").exists()
    assert torch.equal(logits(lora.unload(), token_ids), before)
    assert torch.equal(logits(model.unload(), token_ids), logits(tiny_model("llama"), token_ids))


def test_organs_of_another_build_are_refused():
    """falcon reads at run time from the config which modules a layer has."""
    donor = DonorModel.from_base(tiny_model("falcon", parallel_attn=False), (1, 3))
    assert "built of other modules" in check_compatibility(donor, tiny_model("falcon"))[0]


def test_what_a_readme_breaks_leaves_the_weights(tmp_path):
    A.save_pretrained(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "README.md").write_text("---\n: [bad\n---\ntext")
    with pytest.raises(NotHFError, match="has metadata that cannot be read"):
        B.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == weights


def test_auto_class_extras(tmp_path, base_folder, token_ids):
    DonorModel.from_base(base_folder("llama"), (1, 3)).save_pretrained(tmp_path, variant="fp16")
    organ_alone, info = AutoModel.from_pretrained(tmp_path, variant="fp16", output_loading_info=True)
    assert isinstance(organ_alone, DonorModel) and not info["missing_keys"]
    fresh = AutoModelForCausalLM.from_config(organ_alone.config)
    assert isinstance(fresh, TransplantedForCausalLM) and fresh.config.num_hidden_layers == 6
    DonorModel.from_base(base_folder("llama"), (1, 3)).save_pretrained(tmp_path)
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert isinstance(model, TransplantedForCausalLM) and not info["missing_keys"]
    with pytest.raises(TypeError, match="unexpected arguments for a live recipient: dtype"):
        TransplantedForCausalLM.from_pretrained(model, tmp_path, dtype=torch.float16)
    with pytest.raises(NotHFError, match="is a donor, not a recipient"):
        TransplantedForCausalLM.from_pretrained(tmp_path, tmp_path)


def test_an_organ_is_not_saved_over_another_model(tmp_path, token_ids):
    tiny_model("llama").save_pretrained(tmp_path)
    files = tree(tmp_path)
    model = TransplantedForCausalLM.from_pretrained(tmp_path, A)
    with pytest.raises(NotHFError, match="holds a model of type 'llama'"):
        model.save_pretrained(tmp_path)
    assert tree(tmp_path) == files


def test_a_copy_made_while_disabled_is_enabled(token_ids):
    model = transplanted(("a", A, {"position": 1}))
    expected = logits(model, token_ids)
    base = logits(tiny_model("llama"), token_ids)
    with model.disable_donors():
        twins = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        copy.copy(model)  # shares everything, so it must change nothing
        assert model.active_donors == [] and torch.equal(logits(model, token_ids), base)
    for twin in twins:
        assert twin.active_donors == ["a"] and torch.equal(logits(twin, token_ids), expected)
        assert torch.equal(logits(twin.unload(), token_ids), base)


@pytest.fixture
def remote_code_base(tmp_path):
    """A donor whose base turned into a repo that brings code, and the file which that code would write."""
    tiny_model("llama").save_pretrained(tmp_path / "base")
    DonorModel.from_base(tmp_path / "base", (1, 2)).save_pretrained(tmp_path / "organ")
    config = json.loads((tmp_path / "base" / "config.json").read_text())
    config |= {"model_type": "foreign", "auto_map": {"AutoConfig": "code.C", "AutoModelForCausalLM": "code.M"}}
    (tmp_path / "base" / "config.json").write_text(json.dumps(config))
    proof = tmp_path / "it-ran"
    (tmp_path / "base" / "code.py").write_text(f"open({str(proof)!r}, 'w').close()\nclass C: pass\nclass M: pass\n")
    return tmp_path / "organ", proof


def test_trust_in_one_repos_code_does_not_travel_to_another(remote_code_base):
    donor, proof = remote_code_base
    for load in (
        TransplantedForCausalLM.from_pretrained,
        AutoModelForCausalLM.from_pretrained,
        AutoTokenizer.from_pretrained,
    ):
        with pytest.raises((ValueError, OSError)):
            load(donor, trust_remote_code=True)
    assert not proof.exists()


def test_a_donor_that_names_itself_as_its_base_is_an_error(tmp_path):
    A.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path)}))
    for load in (AutoModelForCausalLM.from_pretrained, AutoTokenizer.from_pretrained):
        with pytest.raises(NotHFError, match="is a donor"):
            load(tmp_path)


def test_a_recipient_whose_config_makes_the_organ_compute_otherwise_is_warned_of(caplog):
    """olmo clips queries and keys by what the config says at run time."""
    donor = DonorModel.from_base(tiny_model("olmo", clip_qkv=0.01), (1, 3))
    TransplantedForCausalLM.from_pretrained(tiny_model("olmo"), donor)
    assert "clip_qkv is 0.01, not None" in caplog.text


def test_a_live_base_with_modules_of_its_own_is_not_cut_without_them():
    base = tiny_model("llama")
    base.model.layers[1].mlp.adapter = torch.nn.Linear(32, 32)
    with pytest.raises(CorruptDonorError, match=r"unexpected organ.layers.0.mlp.adapter"):
        DonorModel.from_base(base, (1, 3))


def test_a_composition_touches_only_its_own_files(tmp_path):
    model = transplanted(("a", A, {}), ("c", C, {}))
    (tmp_path / "model_backup.safetensors").write_bytes(b"mine")
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model_backup.safetensors").read_bytes() == b"mine"
    (tmp_path / "README.md").write_text("---\n: [bad\n---\ntext")
    before = (tmp_path / "a" / "model.safetensors").read_bytes()
    model.delete_donor("a")
    model.load_donor(tiny_organ(9, layers=(1, 2)), "a")
    with pytest.raises(NotHFError, match="cannot be read"):
        model.save_pretrained(tmp_path)
    assert (tmp_path / "a" / "model.safetensors").read_bytes() == before


def test_tables_of_positions_must_be_long_enough():
    donor = DonorModel.from_base(tiny_model("gpt_neo", max_position_embeddings=8), (1, 3))
    assert "attn.attention.bias" in check_compatibility(donor, tiny_model("gpt_neo"))[0]


def test_dropout_does_not_stand_in_the_way_of_a_merge():
    base = tiny_model("gpt2")
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)))
    assert model.merge_and_unload().config.num_hidden_layers == 6
