"""Checkpoints in layouts of the Hub that `save_pretrained` does not write."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from testing.models import tiny_config


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


def write_fp8(folder: Path) -> Path:
    """A tiny llama in weights of 8 bits with a scale per block of 128 × 128, as DeepSeek and Qwen share theirs."""
    config = tiny_config("llama", hidden_size=128, intermediate_size=256, head_dim=32, num_key_value_heads=4)
    native = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    tensors = {}
    for name, tensor in native.state_dict().items():
        if ".layers." in name and name.endswith("proj.weight"):
            rows, columns = tensor.shape
            tensors[name] = tensor.to(torch.float8_e4m3fn)
            tensors[f"{name}_scale_inv"] = 0.05 + torch.rand(rows // 128, columns // 128)
        else:
            tensors[name] = tensor.clone()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    return folder
