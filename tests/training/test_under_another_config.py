"""Training and perplexity of organs in the text models of models for images."""

from __future__ import annotations

import pytest
import torch
from transformers import Trainer

from not_hf import DonorModel, TransplantedForImageTextToText, perplexity
from not_hf.architecture.stack import find_stack, head_class, layers_config
from testing.models import tiny_tokenizer
from testing.training import organ, trained
from testing.wrappers import TOKEN, WRAPPERS, prompt, wrapper

KINDS = [kind for kind in ("llava", "gemma3", "gemma4") if kind in WRAPPERS]
pytestmark = pytest.mark.slow


def recipient(model_type: str) -> TransplantedForImageTextToText:
    base = wrapper(model_type)
    donor = DonorModel.from_base(base, (2, 3), mode="replace")
    return TransplantedForImageTextToText.from_pretrained(base, donor, is_trainable=True)


def with_images(model_type: str) -> list[dict[str, torch.Tensor]]:
    """Rows of one prompt with different images."""
    rows = []
    for n in range(6):
        row = {name: value[0] for name, value in prompt(model_type).items()}
        row["pixel_values"] = row["pixel_values"] + 0.1 * n
        rows.append({**row, "labels": row["input_ids"].masked_fill(row["input_ids"] == TOKEN, -100)})
    return rows


@pytest.mark.parametrize("kind", ["text", "images"])
@pytest.mark.parametrize("model_type", KINDS)
def test_trainers_agree(model_type, kind, tmp_path, caplog):
    data = with_images(model_type) if kind == "images" else None
    plain, whole, cached = (
        trained(tmp_path / str(n), recipient(model_type), data, num_train_epochs=2, **options)
        for n, options in enumerate(({"cls": Trainer}, {}, {"cache_prefix": True}))
    )
    assert cached[0] == whole[0] and all(torch.equal(cached[1][name], each) for name, each in whole[1].items())
    assert whole[0] == pytest.approx(plain[0], abs=1e-4) and whole[0][-1] < whole[0][0]
    warnings = [each for each in caplog.messages if "batches with pixel_values are run whole" in each]
    assert len(warnings) == (kind == "images")


def test_the_organ_keeps_near_the_base(tmp_path):
    """With `kl_weight`, on rows with images."""
    near, far = (
        trained(tmp_path / str(weight), recipient("llava"), with_images("llava"), kl_weight=weight)
        for weight in (10.0, 0.0)
    )
    start = organ(recipient("llava"))
    moved = [sum((each - start[name]).square().sum() for name, each in found[1].items()) for found in (near, far)]
    assert moved[0] < moved[1]


def test_perplexity_of_text_is_that_of_the_text_model():
    whole = wrapper("llava")
    config = layers_config(whole.config)
    text = head_class(config).from_config(config).eval()
    text.load_state_dict(
        {f"model.{name}": tensor for name, tensor in find_stack(whole).base_model.state_dict().items()}
        | {"lm_head.weight": whole.lm_head.weight}
    )
    of_whole, of_text = (
        perplexity.compute(predictions=["w3 w5 w9 w4 w8"], model=each, tokenizer=tiny_tokenizer())
        for each in (whole, text)
    )
    assert of_whole["perplexity"] == pytest.approx(of_text["perplexity"], rel=1e-5)
