"""Averages of organs: weighted, spherical, and what cannot be averaged."""

from __future__ import annotations

import pytest
import torch

from not_hf import (
    DonorModel,
    IncompatibleDonorError,
    NotHFError,
    TransplantedForCausalLM,
    average_donors,
)
from not_hf.donor.combining import OF_VECTORS, SPARSE, ties
from testing.cuts import weights as served
from testing.donors import organ, same, tiny_organ, transplanted, weights
from testing.models import logits, tiny_model


def test_an_average_is_the_weighted_mean_and_waits_to_be_chosen(token_ids):
    a, b = tiny_organ(1, mode="replace"), tiny_organ(2, mode="replace")
    model = transplanted(("a", a, {}))
    model.set_donor([])
    model.load_donor(b, "b")
    model.add_weighted_donor(["a", "b"], [3, 1], "mean")
    assert model.active_donors == ["b"]
    model.set_donor("mean")
    averaged = average_donors([a, b], [0.75, 0.25])
    expected = {name: (3 * tensor + b.state_dict()[name]) / 4 for name, tensor in a.state_dict().items()}
    for name, tensor in averaged.state_dict().items():
        torch.testing.assert_close(tensor, expected[name])
    alone = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), averaged)
    torch.testing.assert_close(logits(model, token_ids), logits(alone, token_ids))
    model.delete_donor("mean")
    model.set_donor("a")
    assert torch.equal(logits(model, token_ids), logits(transplanted(("a", a, {})), token_ids))


def test_an_average_of_organs_in_training_is_frozen():
    model = transplanted(("a", tiny_organ(1), {"is_trainable": True}), ("b", tiny_organ(2), {"is_trainable": True}))
    model.add_weighted_donor(["a", "b"], None, "mean")
    trainable = {name: status.num_trainable_parameters for name, status in model.get_donor_status().items()}
    assert trainable["mean"] == 0 < trainable["a"] == trainable["b"]


def test_an_average_has_the_dtype_of_the_first():
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama").bfloat16(), tiny_organ(1), donor_name="a")
    model.load_donor(tiny_organ(2), "b", is_trainable=True)
    for first, second, dtype in (("a", "b", torch.bfloat16), ("b", "a", torch.float32)):
        model.add_weighted_donor([first, second], None, f"{first} and {second}")
        assert {tensor.dtype for tensor in weights(model, f"{first} and {second}").values()} == {dtype}


def test_an_average_has_the_licences_of_all_and_no_place_found_for_others():
    first, second = tiny_organ(1, license="apache-2.0"), tiny_organ(2, license="cc-by-nc-4.0")
    first.config.best_position, first.config.scale = {"position": 0, "mode": "insert"}, 0.5
    model = transplanted(("a", first, {}), ("b", second, {}))
    model.add_weighted_donor(["a", "b"], None, "mean")
    for config in (average_donors([first, second]).config, model.donor_config["mean"]):
        assert config.license == ["apache-2.0", "cc-by-nc-4.0"]
        assert (config.best_position, config.scale) == (None, 1)
    assert average_donors([first, tiny_organ(2)]).config.license is None  # unknown
    for donor, labels in ((first, ["good", "bad"]), (second, ["bad", "good"])):
        donor.config.labels = labels
    with pytest.raises(IncompatibleDonorError, match=r"labels \['good', 'bad'\] and \['bad', 'good'\] cannot"):
        average_donors([first, second])


def test_slerp_meets_the_ends():
    a, b = tiny_organ(1), tiny_organ(2)
    for weight, end in (([1, 0], a), ([0, 1], b)):
        for name, tensor in average_donors([a, b], weight, "slerp").state_dict().items():
            torch.testing.assert_close(tensor, end.state_dict()[name])


def test_averages_count_at_scale_one():
    model = transplanted(("a", tiny_organ(1), {"position": 1}), ("b", tiny_organ(2), {"position": 3}))
    model.set_donor_scale("a", 0.5)
    model.add_weighted_donor(["a", "b"], None, "mean", combination_type="slerp")
    expected = average_donors([tiny_organ(1), tiny_organ(2)], combination_type="slerp")
    found = {f"{expected.stack.full_path}.{key}": tensor for key, tensor in weights(model, "mean").items()}
    assert same(found, expected.state_dict()) and model.donor_config["mean"].scale == 1


@pytest.mark.parametrize(
    ("names", "weight", "name", "kind", "message"),
    [
        (["a"], [1], "mean", "linear", "needs two or more donors with a weight each, got 1"),
        (["a", "b"], [1], "mean", "linear", "got 2 donors and 1 weights"),
        (["a", "b"], [1, -1], "mean", "linear", "must not sum to 0"),
        (["a", "b"], [1, float("inf")], "mean", "linear", "must be finite"),
        (["a", "b", "b"], [1, 1, 1], "mean", "slerp", "slerp needs two donors"),
        (["a", "b"], [1, 1], "mean", "cat", "combination_type must be one of"),
        (["a", "b"], [1, 1], "mean", "ties", "ties needs density, the share of values that is kept, .* got None"),
        (["a"], [1], "mean", "task_arithmetic", "needs two or more donors"),
        (["a", "c"], [1, 1], "mean", "linear", r"layers \[1, 3\) and \[0, 2\) cannot be averaged"),
        (["a", "x"], [1, 1], "mean", "linear", "no organ named x"),
        (["a", "b"], [1, 1], "a", "linear", "is taken"),
    ],
)
def test_what_cannot_be_averaged_is_refused(names, weight, name, kind, message):
    model = transplanted(("a", tiny_organ(1), {}), ("b", tiny_organ(2), {}), ("c", tiny_organ(3, layers=(0, 2)), {}))
    with pytest.raises(NotHFError, match=message):
        model.add_weighted_donor(names, weight, name, kind)
    assert list(model.donor_config) == ["a", "b", "c"]


def test_values_that_overflow_are_refused():
    donors, base = [tiny_organ(seed).half() for seed in (1, 2)], tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(tiny_model("llama").half(), donors[0], donor_name="a")
    model.load_donor(donors[1], "b")
    message = "non-finite values in .* as torch.float16; choose smaller weights"
    with pytest.raises(NotHFError, match=message):
        average_donors(donors, [1e6, 1e6], "task_arithmetic", base=base)
    with pytest.raises(NotHFError, match=message):
        model.add_weighted_donor(["a", "b"], [1e6, 1e6], "sum", "task_arithmetic", base=base)
    assert list(model.donor_config) == model.active_donors == ["a", "b"]


def differences(donor: DonorModel, base: DonorModel) -> dict[str, torch.Tensor]:
    return {name: tensor - base.state_dict()[name] for name, tensor in donor.state_dict().items()}


def density_of(kind: str) -> dict[str, float]:
    return {"density": 0.4} if kind in SPARSE else {}


@pytest.mark.parametrize(
    "kind",
    [
        each if each in ("task_arithmetic", "ties") else pytest.param(each, marks=pytest.mark.slow)
        for each in OF_VECTORS
    ],
)
def test_combinations_of_what_training_changed_start_at_the_base(kind, base_folder):
    """Of files, whose base is read; of organs that replace layers, and of inserted ones, in the base itself."""
    folder = base_folder("llama")
    base, donors = DonorModel.from_base(folder, (1, 3)), [organ(folder, seed) for seed in (1, 2)]
    torch.manual_seed(0)
    found = average_donors(donors, [0.5, 2.0], kind, **density_of(kind))
    torch.manual_seed(0)
    for name, tensor in found.state_dict().items():
        first, second = (differences(donor, base)[name] for donor in donors)
        expected = OF_VECTORS[kind]([first, second], [0.5, 2.0], **density_of(kind))
        torch.testing.assert_close(tensor, base.state_dict()[name] + expected)
    for mode, position in (("insert", 1), ("replace", 0)):
        model = TransplantedForCausalLM.from_pretrained(
            folder, donors[0], donor_name="a", mode=mode, position=position
        )
        if mode == "replace":
            model.set_donor([])
        model.load_donor(donors[1], "b", mode=mode, position=position)
        torch.manual_seed(0)
        model.add_weighted_donor(["a", "b"], [0.5, 2.0], "both", kind, **density_of(kind))
        ours = {f"{found.stack.full_path}.{key}": tensor for key, tensor in weights(model, "both").items()}
        assert same(ours, found.state_dict())
        assert (model.donor_config["both"].position, model.donor_config["both"].mode) == (position, mode)


def test_an_organ_less_itself_is_the_base(base_folder):
    folder = base_folder("llama")
    donor = organ(folder, 1)
    assert same(average_donors([donor, donor], [1, -1], "task_arithmetic"), DonorModel.from_base(folder, (1, 3)))


def test_the_sign_may_be_that_of_most(base_folder):
    folder = base_folder("llama")
    base, donors = DonorModel.from_base(folder, (1, 3)), [organ(folder, seed) for seed in (1, 2, 3)]
    options = {"density": 0.6, "majority_sign_method": "frequency"}
    found = average_donors(donors, None, "ties", **options).state_dict()
    for name, tensor in found.items():
        vectors = [differences(donor, base)[name] for donor in donors]
        expected = base.state_dict()[name] + ties(vectors, [1.0] * 3, 0.6, "frequency")
        torch.testing.assert_close(tensor, expected)


def test_of_a_base_on_the_hub_only_these_layers_are_read(base_repo, base_folder, hub, cache):
    repo, folder = base_repo("llama"), base_folder("llama")
    donors = [organ(repo, seed) for seed in (1, 2)]
    hub.requests.clear()
    found = average_donors(donors, None, "task_arithmetic")
    assert not served(hub)  # these layers were read for the cut
    other = tiny_model("llama", seed=5)  # not their base
    model = TransplantedForCausalLM.from_pretrained(other, donors[0], donor_name="a")
    model.load_donor(donors[1], "b")
    model.add_weighted_donor(["a", "b"], None, "sum", "task_arithmetic")
    ours = {f"{found.stack.full_path}.{key}": tensor for key, tensor in weights(model, "sum").items()}
    assert same(ours, found.state_dict())
    assert same(average_donors(donors, None, "task_arithmetic", base=folder), found)


def test_in_a_recipient_without_its_layers_they_are_read(base_folder):
    folder = base_folder("llama")
    donors = [organ(folder, seed) for seed in (1, 2)]
    found = average_donors(donors, None, "task_arithmetic")
    model = TransplantedForCausalLM.from_pretrained(folder, donors[0], donor_name="a", scaffold="minimal")
    model.load_donor(donors[1], "b")
    model.add_weighted_donor(["a", "b"], None, "sum", "task_arithmetic")
    ours = {f"{found.stack.full_path}.{key}": tensor for key, tensor in weights(model, "sum").items()}
    assert same(ours, found.state_dict())


@pytest.mark.slow
def test_what_is_missing_is_said(base_folder, tmp_path):
    named, unnamed = organ(base_folder("llama"), 1), tiny_organ(2)
    with pytest.raises(NotHFError, match=r"ties needs layers \[1, 3\) of the base .* none; give it: base=..."):
        average_donors([unnamed, tiny_organ(1)], None, "ties", density=0.5)
    with pytest.raises(NotHFError, match=rf"they name {base_folder('llama')}, none; give it"):
        average_donors([named, unnamed], None, "ties", density=0.5)
    assert average_donors([named, unnamed], None, "ties", density=0.5, base=tiny_model("llama"))
    gone = organ(base_folder("llama"), 2)
    gone.config.base_model_name_or_path = named.config.base_model_name_or_path = str(tmp_path / "gone")
    with pytest.raises(OSError, match=r"which cannot be read: .*gone.* to use another copy, give it: base="):
        average_donors([named, gone], None, "task_arithmetic")
    with pytest.raises(IncompatibleDonorError, match="the base has other tensors than donor 1"):
        average_donors([named, gone], None, "task_arithmetic", base=tiny_model("llama", hidden_size=64))
    model = transplanted(("a", tiny_organ(1), {}), ("b", tiny_organ(2), {}))
    model.add_weighted_donor(["a", "b"], None, "sum", "task_arithmetic")  # cut from a model like this one
    other = TransplantedForCausalLM.from_pretrained(tiny_model("llama", rms_norm_eps=1e-3), tiny_organ(1))
    other.load_donor(tiny_organ(2), "b")
    with pytest.raises(NotHFError, match="they name none; give it: base="):
        other.add_weighted_donor(["default", "b"], None, "sum", "task_arithmetic")
    other.add_weighted_donor(["default", "b"], None, "sum", "task_arithmetic", base=tiny_model("llama"))
    ours, theirs = weights(other, "sum"), weights(model, "sum")
    assert same(ours, theirs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"combination_type": "ties", "density": 0}, "above 0 and at most 1, got 0"),
        ({"combination_type": "dare_linear", "density": 1.5}, "got 1.5"),
        ({"combination_type": "linear", "density": 0.5}, "linear keeps every value; leave out density=0.5"),
        ({"combination_type": "ties", "density": 0.5, "majority_sign_method": "most"}, "must be one of .*'frequency'"),
        ({"combination_type": "ties", "density": 0.5, "weights": [1.0]}, "got 2 donors and 1 weights"),
        ({"combination_type": "ties", "density": 0.5, "weights": [1.0, float("nan")]}, "must be finite"),
    ],
)
def test_wrong_arguments_are_refused_before_anything_is_read(options, message):
    with pytest.raises(NotHFError, match=message):
        average_donors(["me/nowhere", "me/nothing"], **options)
