"""DeepSpeed ZeRO-3: organs are whole when they are loaded and saved, or refused; never empty."""

from __future__ import annotations

import pytest
import torch
from transformers.integrations import deepspeed
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from not_hf import DonorModel, NotHFError, TransplantedForCausalLM
from not_hf.architecture.upstream import built_whole
from testing.launching import ON_CPU, accelerate, difference, train
from testing.models import tiny_model


class Zero3:
    """What `HfDeepSpeedConfig` answers."""

    def is_zero3(self) -> bool:
        return True


def partition(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Make parameters look as DeepSpeed leaves them; returns what they were."""
    whole = {}
    for n, (name, parameter) in enumerate(module.named_parameters()):
        whole[name] = parameter.data
        parameter.ds_id, parameter.ds_shape, parameter.ds_tensor = n, parameter.shape, parameter.data.flatten()
        parameter.data = torch.empty(0)
    return whole


def test_partitioned_organs_are_refused_and_gathered_ones_saved(tmp_path):
    base = tiny_model("llama")
    model = TransplantedForCausalLM.from_pretrained(base, DonorModel.from_base(base, (1, 3)), is_trainable=True)
    model.save_pretrained(tmp_path / "before")
    whole = partition(model)
    with pytest.raises(NotHFError, match=r"DeepSpeed ZeRO-3.*stage3_gather_16bit_weights_on_model_save"):
        model.save_pretrained(tmp_path / "organ")
    assert not (tmp_path / "organ").exists()
    model.save_pretrained(tmp_path / "organ", state_dict=whole)
    assert difference(tmp_path / "organ", tmp_path / "before") == 0


def test_a_partitioned_recipient_is_refused():
    base = tiny_model("llama")
    donor = DonorModel.from_base(base, (1, 3))
    partition(base)
    with pytest.raises(NotHFError, match="before training begins"):
        TransplantedForCausalLM.from_pretrained(base, donor)
    assert type(base).__mro__[0].__name__ == "LlamaForCausalLM" and not isinstance(base, TransplantedForCausalLM)


def test_models_load_whole_while_zero3_is_on(base_folder, tmp_path, token_ids):
    folder = base_folder("llama")
    config = Zero3()
    deepspeed.set_hf_deepspeed_config(config)
    try:
        with built_whole():
            assert not is_deepspeed_zero3_enabled()
        DonorModel.from_base(folder, (1, 3)).save_pretrained(tmp_path / "organ")
        model = TransplantedForCausalLM.from_pretrained(folder, tmp_path / "organ")
        assert is_deepspeed_zero3_enabled()
    finally:
        deepspeed.unset_hf_deepspeed_config()
    plain = TransplantedForCausalLM.from_pretrained(folder, tmp_path / "organ")
    assert torch.equal(model(token_ids).logits, plain(token_ids).logits)


@pytest.mark.slow
def test_two_processes_with_zero3_make_what_one_does(base_folder, tmp_path):
    pytest.importorskip("deepspeed", reason="not in the dev extra: it builds from source")
    train([], base_folder("llama"), tmp_path / "alone", "--cpu", batch_size=4)
    train([*accelerate("deepspeed_zero3.yaml"), ON_CPU], base_folder("llama"), tmp_path / "run")
    assert difference(tmp_path / "run" / "organ", tmp_path / "alone" / "organ") < 1e-4  # sums in another order
    assert list((tmp_path / "run" / "checkpoint-2").glob("global_step2/zero_pp_rank_1_*"))  # it was ZeRO-3 indeed
