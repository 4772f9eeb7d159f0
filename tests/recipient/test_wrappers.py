"""Layers under another config: the text models inside of those for images and sounds."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import (
    AutoModelForCausalLM,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessor,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    pipeline,
)

from not_hf import (
    DonorModel,
    TransplantedForCausalLM,
    TransplantedForImageTextToText,
    TransplantedForMultimodalLM,
    UnsupportedArchitectureError,
    check_compatibility,
    check_donor,
    merge_donor,
    reference_model,
)
from not_hf.architecture.splicing import moved_features
from not_hf.architecture.stack import find_stack, head_class, layers_config
from testing.donors import moved, organ, same
from testing.models import exact_logits, tiny_model, tiny_tokenizer
from testing.wrappers import TOKEN, WRAPPERS, prompt, wrapper

pytestmark = pytest.mark.slow


def logits(model: PreTrainedModel, model_type: str) -> torch.Tensor:
    """Scores for a prompt with an image or a sound, `(batch, seq, vocab)`."""
    inputs = prompt(model_type)
    return exact_logits(model, inputs.pop("input_ids"), **inputs)


def class_for(model_type: str) -> type[TransplantedForImageTextToText | TransplantedForMultimodalLM]:
    return TransplantedForMultimodalLM if model_type == "qwen2_audio" else TransplantedForImageTextToText


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a tiny base, by model type."""
    made: dict[str, Path] = {}

    def get(model_type: str) -> Path:
        if model_type not in made:
            made[model_type] = tmp_path_factory.mktemp(f"{model_type}-")
            wrapper(model_type).save_pretrained(made[model_type], max_shard_size="50KB")
        return made[model_type]

    return get


@pytest.mark.parametrize("position", range(4))
def test_an_organ_that_moves_features_of_images_to_other_layers_is_warned_of(position, folder, tmp_path, caplog):
    native = wrapper("qwen3_vl")  # it adds features behind its first two layers
    bare = logits(native, "qwen3_vl")
    silent = DonorModel.from_base(native, (0, 1), init="identity", position=position)
    silent.save_pretrained(tmp_path)
    model = TransplantedForImageTextToText.from_pretrained(native, silent)
    is_moved = position < 2
    assert torch.equal(logits(model, "qwen3_vl"), bare) is not is_moved
    said = "an organ that is inserted below position 2 moves them to other layers"
    assert (said in caplog.text) is is_moved
    for found in (check_compatibility(silent, native), check_donor(tmp_path, folder("qwen3_vl"))):
        assert not found and (said in str(found.differences)) is is_moved
    replaced = check_compatibility(DonorModel.from_base(folder("qwen3_vl"), (0, 1), mode="replace"), native)
    assert said not in str(replaced.differences)


def test_the_layers_to_which_features_of_images_are_added_may_be_listed():
    whole = PreTrainedConfig(spatial_target_layers=[5, 3], deepstack_layer_map=[(9, 4), (8, 6)])
    assert [len(moved_features(whole, position, "insert")) for position in (0, 5, 6)] == [1, 1, 0]
    assert moved_features(whole, 0, "replace") == moved_features(PreTrainedConfig(), 0, "insert") == []


@pytest.mark.parametrize("model_type", ["llava", "qwen3_vl"])
def test_a_reference_reads_images(model_type):
    native = wrapper(model_type)
    bare = logits(native, model_type)
    model = TransplantedForImageTextToText.from_pretrained(native, organ(native, 1))
    inputs = prompt(model_type)
    loss = reference_model(model)(**inputs, labels=inputs["input_ids"]).loss
    assert loss > 0 and torch.equal(logits(reference_model(model), model_type), bare)


@pytest.mark.parametrize("mode", ["insert", "replace"])
@pytest.mark.parametrize("model_type", WRAPPERS)
def test_life_of_an_organ(model_type, mode, folder, tmp_path):
    native = wrapper(model_type)
    bare, tensors, config = logits(native, model_type), copy.deepcopy(native.state_dict()), native.config.to_dict()
    donor = moved(DonorModel.from_base(folder(model_type), (1, 3), mode=mode), 1)
    assert donor.config.base_config["model_type"] == layers_config(native.config).model_type
    kind = class_for(model_type)
    model = kind.from_pretrained(native, donor, donor_name="kjv")
    depth = 6 if mode == "insert" else 4
    assert isinstance(model, kind) and layers_config(model.config).num_hidden_layers == depth
    expected = logits(model, model_type)
    assert not torch.equal(expected, bare)
    with model.disable_donors():
        assert torch.equal(logits(model, model_type), bare)

    merged = copy.deepcopy(model).merge_and_unload()
    options = {**prompt(model_type), "max_new_tokens": 6, "do_sample": False, "suppress_tokens": [TOKEN]}
    generated = [each.generate(**options, use_cache=cached) for each in (model, merged) for cached in (True, False)]
    assert torch.equal(generated[0], generated[2]) and torch.equal(generated[1], generated[3])
    if model_type != "paligemma":  # it sees both sides of its prompt, which without a cache is everything so far
        assert torch.equal(generated[0], generated[1])

    model.save_pretrained(tmp_path / "organ")
    assert same(DonorModel.from_pretrained(tmp_path / "organ"), donor)
    again = kind.from_pretrained(folder(model_type), tmp_path / "organ")
    assert torch.equal(logits(again, model_type), expected)

    merged.save_pretrained(tmp_path / "merged")
    reloaded = type(merged).from_pretrained(tmp_path / "merged")
    assert torch.equal(logits(reloaded, model_type), expected)
    assert model.unload() is native and same(native, tensors) and native.config.to_dict() == config


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_an_untouched_organ_in_its_own_place_changes_nothing(model_type, folder):
    """Cut from files and from a live model; the config of the donor is that of the text model."""
    base = wrapper(model_type)
    bare = logits(base, model_type)
    donor, live = (DonorModel.from_base(each, (1, 3), mode="replace") for each in (folder(model_type), base))
    assert same(donor, live) and donor.config.base_config == live.config.base_config
    model = class_for(model_type).from_pretrained(folder(model_type), donor)
    assert torch.equal(logits(model, model_type), bare)


@pytest.mark.parametrize("model_type", WRAPPERS)
def test_an_organ_moves_between_the_whole_and_the_text_model(model_type, folder, tmp_path):
    base = wrapper(model_type)
    text = head_class(layers_config(base.config)).from_config(layers_config(base.config)).eval()
    find_stack(text).base_model.load_state_dict(find_stack(base).base_model.state_dict())
    text.save_pretrained(tmp_path / "text")
    of_text, of_whole = (organ(each, 1) for each in (tmp_path / "text", folder(model_type)))
    assert same(of_text, of_whole)
    results = [
        logits(class_for(model_type).from_pretrained(folder(model_type), each), model_type)
        for each in (of_text, of_whole)
    ]
    assert torch.equal(*results)
    if head_class(text.config) is AutoModelForCausalLM:
        ids = torch.tensor([[1, 5, 9, 33]])
        first, second = (
            TransplantedForCausalLM.from_pretrained(tmp_path / "text", each)(ids).logits
            for each in (of_text, of_whole)
        )
        assert torch.equal(first, second)


@pytest.mark.skipif("gemma4" not in WRAPPERS, reason="this release of transformers has no gemma4")
def test_layers_with_inputs_of_their_own_are_replaced_under_another_config(tmp_path):
    """As in the small models of Gemma 4, whose last layers also take keys and values of others."""
    small = {"hidden_size_per_layer_input": 8, "num_kv_shared_layers": 1, "enable_moe_block": False}
    small["layer_types"] = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
    base = wrapper("gemma4", **small)
    bare = logits(base, "gemma4")
    base.save_pretrained(tmp_path / "base")
    donor = organ(tmp_path / "base", 1, (0, 2), mode="replace")
    model = TransplantedForImageTextToText.from_pretrained(base, donor)
    expected = logits(model, "gemma4")
    with model.disable_donors():
        assert torch.equal(logits(model, "gemma4"), bare) and not torch.equal(expected, bare)
    options = {**prompt("gemma4"), "max_new_tokens": 6, "do_sample": False, "suppress_tokens": [TOKEN]}
    assert torch.equal(model.generate(**options), model.generate(**options, use_cache=False))
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert torch.equal(logits(type(base).from_pretrained(tmp_path / "merged"), "gemma4"), expected)


def test_the_class_for_causal_lms_names_the_other(folder):
    with pytest.raises(
        UnsupportedArchitectureError, match="'llava' is no causal LM; use TransplantedForImageTextToText"
    ):
        TransplantedForCausalLM.from_pretrained(folder("llava"), organ(folder("llava"), 1))
    with pytest.raises(UnsupportedArchitectureError, match="no AutoModelForImageTextToText for model_type 'llama'"):
        TransplantedForImageTextToText.from_pretrained(tiny_model("llama"), organ(tiny_model("llama"), 1))


@pytest.mark.parametrize("where", ["folder", "repo"])
def test_a_pipeline_takes_it_by_id(where, hub, tmp_path):
    """The processor is that of the base, which is on the Hub or copied into the donor's folder."""
    tokenizer = copy.deepcopy(tiny_tokenizer())  # all tests share it
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    model = wrapper("llava")
    model.resize_token_embeddings(len(tokenizer))
    model.config.image_token_id = tokenizer.convert_tokens_to_ids("<image>")
    image_processor = CLIPImageProcessor(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=4,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )
    base = str(tmp_path / "base")
    if where == "repo":
        base = "me/tiny-llava"
        model.push_to_hub(base)
        processor.push_to_hub(base)
    else:
        model.save_pretrained(base)
        processor.save_pretrained(base)
    TransplantedForImageTextToText.from_pretrained(base, organ(base, 1)).save_pretrained(tmp_path / "organ")
    pipe = pipeline("image-text-to-text", model=str(tmp_path / "organ"), device="cpu")
    assert isinstance(pipe.model, TransplantedForImageTextToText) and type(pipe.processor) is LlavaProcessor
    image = Image.new("RGB", (8, 8), "red")
    (shown,) = pipe(text="<image> w3 w5", images=image, max_new_tokens=4, do_sample=False)
    inputs = processor(text="<image> w3 w5", images=image, return_tensors="pt")
    expected = pipe.model.generate(**inputs, max_new_tokens=4, do_sample=False)
    assert shown["generated_text"].endswith(tokenizer.decode(expected[0, -4:], skip_special_tokens=True))
    assert type(AutoProcessor.from_pretrained(tmp_path / "organ")) is LlavaProcessor
    assert len(AutoTokenizer.from_pretrained(tmp_path / "organ")) == len(tokenizer)
    merge_donor(tmp_path / "organ", tmp_path / "merged")
    merged = pipeline("image-text-to-text", model=str(tmp_path / "merged"), device="cpu")
    assert type(merged.processor) is LlavaProcessor and type(merged.model) is type(model)
    (again,) = merged(text="<image> w3 w5", images=image, max_new_tokens=4, do_sample=False)
    assert again["generated_text"] == shown["generated_text"]
