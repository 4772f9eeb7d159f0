"""Training on a GPU: each trainer takes the same steps, and what is cached is what would be computed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Trainer

from not_hf import DonorModel, DonorTrainer, TransplantedForCausalLM, perplexity
from testing.donors import SPAN
from testing.gpu import DEVICE, close, needs_gpu, on_gpu, require_on_gpu, scores
from testing.models import CHECKPOINTING, tiny_model, tiny_tokenizer
from testing.training import losses, made, rows

pytestmark = needs_gpu
TOLERANCE = {"float32": 5e-4, "bfloat16": 5e-2, "float16": 2e-2}


def trained(
    folder: Any, model_type: str, dtype: str, cls: type[Trainer] = DonorTrainer, **options: Any
) -> list[float]:
    """The losses of two layers under which two stay frozen; `dtype` is the base's, and that of autocast."""
    base = on_gpu(model_type, dtype=getattr(torch, dtype))
    donor = DonorModel.from_base(base, (2, 4), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    learning = [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert all(parameter.dtype == torch.float32 for parameter in learning)
    precision = {"bf16": dtype == "bfloat16", "fp16": dtype == "float16"}
    trainer = made(model, folder, cls=cls, use_cpu=False, eval_dataset=rows(4), **precision, **options)
    trainer.train()
    require_on_gpu(model)
    found = [*losses(trainer), trainer.evaluate()["eval_loss"]]
    model.save_pretrained(folder / "organ")
    again = TransplantedForCausalLM.from_pretrained(on_gpu(model_type, dtype=getattr(torch, dtype)), folder / "organ")
    torch.testing.assert_close(scores(again), scores(model), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])
    return found


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_training(model_type, dtype, tmp_path):
    expected = trained(tmp_path / "plain", model_type, dtype, Trainer)
    assert expected[-2] < expected[0]
    for name, options in {
        "donor trainer": {},
        "chunked": {"head_chunk": 7},
        "cached": {"cache_prefix": True, "prefix_dir": tmp_path / "prefixes"},
        "cached before": {"cache_prefix": True, "prefix_dir": tmp_path / "prefixes"},
    }.items():
        found = trained(tmp_path / name, model_type, dtype, **options)
        assert found == pytest.approx(expected, abs=TOLERANCE[dtype]), name


@pytest.mark.parametrize("cls", [Trainer, DonorTrainer])
def test_checkpoints(cls, tmp_path):
    expected = trained(tmp_path, "llama", "float32", cls, save_strategy="steps", save_steps=4)
    found = trained(tmp_path / "checkpointed", "llama", "float32", cls, **{CHECKPOINTING: True})
    assert found == pytest.approx(expected, abs=TOLERANCE["float32"])
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(
        base, DonorModel.from_base(base, (2, 4), mode="replace"), is_trainable=True
    )
    trainer = made(model, tmp_path, cls=cls, use_cpu=False, eval_dataset=rows(4))  # which moves the model
    trainer.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-4"))
    assert [*losses(trainer), trainer.evaluate()["eval_loss"]] == pytest.approx(expected, abs=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({"kl_weight": 0.5}, 5e-4), ({"optimizer": "muon"}, 2e-2), ({"prefix_dtype": torch.bfloat16}, 2e-2)],
    ids=str,
)
def test_options_of_the_donor_trainer(options, tolerance, tmp_path):
    plain = trained(tmp_path / "plain", "llama", "float32", **options)
    cached = trained(tmp_path / "cached", "llama", "float32", cache_prefix=True, **options)
    assert cached == pytest.approx(plain, abs=tolerance)


def test_rows_of_new_tokens_are_trained(tmp_path):
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (2, 4), mode="replace", trainable_token_indices=[5, 90])
    model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
    trainer = made(model, tmp_path, use_cpu=False)  # which moves the model
    trainer.train()
    assert losses(trainer)[-1] < losses(trainer)[0]
    require_on_gpu(model)
    expected = scores(model)
    model.save_pretrained(tmp_path / "organ")
    close(scores(TransplantedForCausalLM.from_pretrained(on_gpu("llama"), tmp_path / "organ")), expected)
    close(scores(model.merge_and_unload()), expected)


@pytest.mark.parametrize("init", ["copy", "identity"])
def test_everything_made_on_the_gpu_by_default(init, base_folder, tmp_path):
    base = str(base_folder("llama"))
    with torch.device(DEVICE):
        donor = DonorModel.from_base(base, SPAN, init=init)
        model = TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)
        model.set_donor_scale("default", 0.5)
        model.save_pretrained(tmp_path / "organ")
        again = TransplantedForCausalLM.from_pretrained(base, tmp_path / "organ")
        require_on_gpu(again)
        close(scores(again), scores(model))
        perplexity.compute(predictions=["w5 w6 w7"], model=again, tokenizer=tiny_tokenizer())
