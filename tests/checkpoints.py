"""Checkpoints in layouts of the Hub that `save_pretrained` does not write."""

from __future__ import annotations

from pathlib import Path

import torch
from architectures import tiny_config
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM


def write_mxfp4(folder: Path) -> Path:
    """A tiny gpt_oss as it lies on the Hub: experts in blocks of 32 four-bit numbers with a scale each."""
    config = tiny_config("gpt_oss", hidden_size=64, intermediate_size=32, head_dim=16)
    native = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in native.state_dict().items():
        if name.endswith(("gate_up_proj", "down_proj")):
            experts, width, rows = tensor.shape  # a module has them transposed
            shape = (experts, rows, width // 32)
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (*shape, 16), dtype=torch.uint8, generator=generator)
            tensors[f"{name}_scales"] = torch.randint(118, 124, shape, dtype=torch.uint8, generator=generator)
        else:
            tensors[name] = torch.empty(tensor.shape).normal_(0, 0.1, generator=generator).to(torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    spared = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config.quantization_config = {"quant_method": "mxfp4", "modules_to_not_convert": spared}
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder
