"""Tiny models whose decoder layers stand under another config: with images or sounds in the prompt."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    PreTrainedModel,
)

from not_hf.architecture.releases import CACHES_FOLLOW_STATES
from testing.shapes import ARCHITECTURES, LLAMA, NUM_LAYERS, SPECIAL

TOKEN = 95  # stands for an image, or a part of one
_TEXT = {**SPECIAL, **LLAMA, "max_position_embeddings": 128}
_GEMMA = {**_TEXT, "sliding_window": 6, "query_pre_attn_scalar": 8}
_GEMMA["layer_types"] = ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2)
_GEMMA4 = {**_TEXT, **ARCHITECTURES.get("gemma4_text", {}), "max_position_embeddings": 128}
_TOWER = {  # as many layers as the text model has
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "image_size": 8,
    "patch_size": 4,
}
_QWEN_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "depth": NUM_LAYERS,
    "num_heads": 4,
    "patch_size": 4,
    "temporal_patch_size": 2,
    "spatial_merge_size": 2,
    "out_hidden_size": 32,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0, 1],
}
_GEMMA4_IMAGES = {
    "vision_config": {
        **{key: value for key, value in _TOWER.items() if key != "image_size"},
        **{"num_key_value_heads": 4, "head_dim": 8, "pooling_kernel_size": 2, "position_embedding_size": 8},
    },
    "audio_config": None,
    "image_token_id": TOKEN,
    **{"video_token_id": 94, "audio_token_id": 93, "boi_token_id": 92, "eoi_token_id": 91},
}
_MROPE = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
_QWEN_TOKENS = {"image_token_id": TOKEN, "video_token_id": 94, "vision_start_token_id": 93, "vision_end_token_id": 92}


def _image(num_tokens: int, size: int = 8, **more: Any) -> Callable[[], dict[str, Any]]:
    """A prompt with an image, which takes `num_tokens` tokens."""

    def inputs() -> dict[str, Any]:
        ids = torch.tensor([[1, 5, *[TOKEN] * num_tokens, 9, 33, 40, 7]])
        pixels = torch.randn(1, 3, size, size, generator=torch.Generator().manual_seed(2))
        return {"input_ids": ids, "pixel_values": pixels, **more}

    return inputs


def _qwen_image() -> dict[str, Any]:
    patches = torch.randn(16, 3 * 2 * 4 * 4, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 5, 93, *[TOKEN] * 4, 92, 9, 33, 40, 7]])
    types = (ids == TOKEN).int()
    return {
        "input_ids": ids,
        "pixel_values": patches,
        "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": types,
    }


def _gemma4_image() -> dict[str, Any]:
    patches = torch.rand(1, 16, 3 * 4 * 4, generator=torch.Generator().manual_seed(2))
    places = torch.tensor([[[n % 4, n // 4] for n in range(16)]])
    ids = torch.tensor([[1, 5, *[TOKEN] * 4, 9, 33, 40, 7]])
    types = (ids == TOKEN).int()
    return {"input_ids": ids, "pixel_values": patches, "image_position_ids": places, "mm_token_type_ids": types}


def _smolvlm_image() -> dict[str, Any]:
    inputs = _image(4, 16)()
    return {**inputs, "pixel_values": inputs["pixel_values"][:, None]}


def _sound() -> dict[str, Any]:
    features = torch.randn(1, 8, 16, generator=torch.Generator().manual_seed(2))
    ids = torch.tensor([[1, 5, *[TOKEN] * 4, 9, 33, 40, 7]])
    return {
        "input_ids": ids,
        "input_features": features,
        "feature_attention_mask": torch.ones(1, 16, dtype=torch.long),
    }


# config; prompt
WRAPPERS: dict[str, tuple[dict[str, Any], Callable[[], dict[str, Any]]]] = {
    "llava": (
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_TOWER, "model_type": "clip_vision_model"},
            "image_token_index": TOKEN,
            "image_seq_length": 4,
            "vision_feature_layer": -1,
        },
        _image(4),
    ),
    "gemma3": (
        {
            "text_config": _GEMMA,
            "vision_config": {**_TOWER, "vision_use_head": False},
            "image_token_index": TOKEN,
            "mm_tokens_per_image": 4,
            "boi_token_index": 93,
            "eoi_token_index": 92,
        },
        _image(4),
    ),
    "gemma4": (
        {
            "text_config": {
                **{**_GEMMA4, "hidden_size_per_layer_input": 0, "use_bidirectional_attention": "vision"},
                **{"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16},
            },
            **_GEMMA4_IMAGES,
        },
        _gemma4_image,
    ),
    "qwen3_vl": (
        {"text_config": {**_TEXT, "rope_parameters": _MROPE}, "vision_config": _QWEN_TOWER, **_QWEN_TOKENS},
        _qwen_image,
    ),
    "smolvlm": (
        {
            "text_config": {**_TEXT, "model_type": "llama"},
            "vision_config": {**_TOWER, "image_size": 16},
            "image_token_id": TOKEN,
            "scale_factor": 2,
        },
        _smolvlm_image,
    ),
    "mistral3": (
        {
            "text_config": {**_TEXT, "model_type": "mistral", "sliding_window": None},
            "vision_config": {**_TOWER, "image_size": 16, "model_type": "pixtral", "head_dim": 8},
            "image_token_index": TOKEN,
            "spatial_merge_size": 2,
            "vision_feature_layer": -1,
        },
        _image(4, 16, image_sizes=torch.tensor([[16, 16]])),
    ),
    "paligemma": (
        {
            "text_config": {**_TEXT, "model_type": "gemma"},
            "vision_config": {
                **_TOWER,
                "vision_use_head": False,
                "projection_dim": 32,
                "model_type": "siglip_vision_model",
            },
            "image_token_index": TOKEN,
            "projection_dim": 32,
        },
        _image(4),
    ),
    "qwen2_audio": (
        {
            "text_config": {**_TEXT, "model_type": "qwen2"},
            "audio_config": {
                "d_model": 32,
                "encoder_layers": NUM_LAYERS,
                "encoder_attention_heads": 4,
                "encoder_ffn_dim": 48,
                "num_mel_bins": 8,
                "max_source_positions": 8,
                "model_type": "qwen2_audio_encoder",
            },
            "audio_token_index": TOKEN,
        },
        _sound,
    ),
    "qwen3_5": (
        {
            "text_config": {
                **_TEXT,
                "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0},
                "layer_types": ["linear_attention", "full_attention"] * 2,
                "linear_num_key_heads": 2,
                "linear_num_value_heads": 2,
                "linear_key_head_dim": 8,
                "linear_value_head_dim": 8,
            },
            "vision_config": _QWEN_TOWER,
            **_QWEN_TOKENS,
        },
        _qwen_image,
    ),
}
for _name in (WRAPPERS.keys() - CONFIG_MAPPING.keys()) | (set() if CACHES_FOLLOW_STATES else {"qwen3_5"}):
    del WRAPPERS[_name]


def wrapper(model_type: str, seed: int = 0, **text: Any) -> PreTrainedModel:
    """A tiny model of that type in eval mode, every parameter random; `text` are values of the text model's config."""
    torch.manual_seed(seed)
    values = copy.deepcopy(WRAPPERS[model_type][0])
    values["text_config"] |= text
    config = AutoConfig.for_model(model_type, **values)
    auto = AutoModelForMultimodalLM if model_type == "qwen2_audio" else AutoModelForImageTextToText
    model = auto.from_config(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn_like(parameter)
            parameter.copy_(1 + 0.1 * noise if "norm" in name.lower() or "ln_" in name else 0.15 * noise)
    model.tie_weights()
    model.generation_config.eos_token_id = None
    return model.eval()


def prompt(model_type: str) -> dict[str, Any]:
    """Inputs with an image or a sound."""
    return WRAPPERS[model_type][1]()
