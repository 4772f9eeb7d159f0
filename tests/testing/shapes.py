"""Shapes of the tiny models of every architecture in the matrix, rich enough that layers differ and mistakes show."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import pytest
from transformers import CONFIG_MAPPING

from not_hf.architecture.releases import CACHES_FOLLOW_STATES

VOCAB = 96
NUM_LAYERS = 4

SPECIAL = {"vocab_size": VOCAB, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_GPT = {"n_embd": 32, "n_layer": NUM_LAYERS, "n_head": 4, "n_positions": 64}
_NEOX = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}

ARCHITECTURES: dict[str, dict] = {
    "gpt2": _GPT,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": NUM_LAYERS,
        "num_heads": 4,
        "intermediate_size": 48,
        "attention_types": [[["global", "local"], NUM_LAYERS // 2]],
        "window_size": 4,
        "max_position_embeddings": 64,
    },
    "gpt_neox": _NEOX,
    "gptj": {**_GPT, "rotary_dim": 4},
    "opt": {
        "hidden_size": 32,
        "ffn_dim": 48,
        "num_hidden_layers": NUM_LAYERS,
        "num_attention_heads": 4,
        "word_embed_proj_dim": 16,
        "max_position_embeddings": 64,
    },
    "bloom": {"hidden_size": 32, "n_layer": NUM_LAYERS, "n_head": 4},
    "falcon": {"hidden_size": 32, "num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4},
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 6},
    "mixtral": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3": {**LLAMA, "use_sliding_window": True, "sliding_window": 6, "max_window_layers": 2},
    "qwen3_moe": {
        **LLAMA,
        "moe_intermediate_size": 16,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 2,
    },
    "gemma2": {**LLAMA, "sliding_window": 6, "query_pre_attn_scalar": 8},
    "gemma3_text": {
        **LLAMA,
        "sliding_window": 6,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"] * (NUM_LAYERS // 2),
    },
    "gemma4_text": {  # full layers have other heads
        **LLAMA,
        "sliding_window": 6,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention", "full_attention"],
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "attention_k_eq_v": True,
        "hidden_size_per_layer_input": 0,
        "vocab_size_per_layer_input": VOCAB,
    },
    "phi3": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "olmo2": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "gpt_oss": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 6},
    "smollm3": {**{k: v for k, v in LLAMA.items() if k != "head_dim"}, "no_rope_layers": [1, 0, 1, 1]},
    "stablelm": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "starcoder2": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "cohere": {k: v for k, v in LLAMA.items() if k != "head_dim"},
    "granite": {
        **{k: v for k, v in LLAMA.items() if k != "head_dim"},
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.3,
        "logits_scaling": 2.0,
    },
}

WHOLE = frozenset(ARCHITECTURES)

# For the rows that follow, what fits of `ANY` goes into each config.
_MLA = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
}
_DELTA_NET = {
    "linear_conv_kernel_dim": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 4,
    "linear_num_value_heads": 16,
}
_MAMBA2 = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_n_groups": 2, "mamba_chunk_size": 4}
_MIXED = {"layer_types": ["linear_attention", "full_attention"] * (NUM_LAYERS // 2)}
_CONVOLUTIONS = {"layer_types": ["conv", "full_attention"] * (NUM_LAYERS // 2)}
_SPARSE = {"mlp_layer_types": ["dense", "sparse", "sparse", "dense"], "num_local_experts": 4, "n_group": 1}

# Layers with a state instead of keys and values: linear attention, state spaces, convolutions.
STATEFUL: dict[str, dict] = {
    "bamba": {**_MAMBA2, "attn_layer_indices": [1, 3]},
    "falcon_h1": {**_MAMBA2, "mamba_d_ssm": 64, "ssm_multipliers": [0.9, 1.1, 0.8, 1.2, 0.7], "key_multiplier": 0.6},
    "granitemoehybrid": {**_MAMBA2, **_MIXED, "num_local_experts": 4, "shared_intermediate_size": 16},
    "jamba": {
        **{"attn_layer_period": 8, "attn_layer_offset": 0, "expert_layer_period": 1, "expert_layer_offset": 0},
        "mamba_d_state": 4,
    },
    "lfm2": _CONVOLUTIONS,
    "mamba": {"state_size": 4},
    "mamba2": {"num_heads": 4, "head_dim": 16, "state_size": 8, "n_groups": 2, "chunk_size": 4},
    "minimax": {"layer_types": _MIXED["layer_types"][::-1], "block_size": 4, "num_local_experts": 4},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "full_attention", "moe", "mlp"],
        **{"mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 2, "chunk_size": 4},
        "moe_shared_expert_intermediate_size": 16,
    },
    "qwen3_5_text": {**_DELTA_NET, **_MIXED},
    "qwen3_next": {**_DELTA_NET, **_MIXED, "decoder_sparse_step": 2},
}
PLAIN: dict[str, dict] = {"deepseek_v3": _MLA, "exaone4": {}, "glm4": {}, "olmo3": {}, "qwen2_moe": {}, "seed_oss": {}}
ARCHITECTURES |= STATEFUL | PLAIN

# More of them, for fewer tests.
OTHER_STATEFUL: dict[str, dict] = {
    "bailing_hybrid": {**_MLA, **_MIXED, **_SPARSE, "head_dim": 8},
    "falcon_mamba": {"state_size": 4},
    "kimi_linear": {**_MLA, **_MIXED, **_SPARSE, "linear_head_dim": 8, "linear_num_heads": 4},
    "lara_mini": {**_DELTA_NET, "layer_types": ["linear_attention", "sliding_attention"] * (NUM_LAYERS // 2)},
    "lfm2_moe": {**_CONVOLUTIONS, "num_dense_layers": 1},
    "lfm3": _CONVOLUTIONS,
    "olmo_hybrid": {**_DELTA_NET, **_MIXED},
    "qwen3_5_moe_text": {**_DELTA_NET, **_MIXED},
}
_PER_LAYER_INPUTS = {  # the last layer takes keys and values of the one before it
    "gemma3n_text": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "sliding_attention"],
        "num_kv_shared_layers": 1,
        "intermediate_size": [48, 40, 32, 48],
        "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0],
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": VOCAB, "laurel_rank": 4},
    }
}
_OWN_VALUES = {  # some layers have config values of their own
    "dots3_note_text": {
        **{**_MLA, "index_head_dim": 16, "index_n_heads": 2, "index_topk": 32},
        "layer_types": ["indexed_attention", "sliding_attention"] * (NUM_LAYERS // 2),
        "per_layer_config": {
            n: {"num_attention_heads": 2, "num_key_value_heads": 2, "kv_lora_rank": 8, "head_dim": 16} for n in (1, 3)
        },
    },
    "gemma4_unified_text": {
        key: value for key, value in ARCHITECTURES["gemma4_text"].items() if "per_layer" not in key
    },
}
OTHERS: dict[str, dict] = (
    OTHER_STATEFUL
    | _PER_LAYER_INPUTS
    | _OWN_VALUES
    | {
        name: {}
        for name in (
            *("apertus", "arcee", "biogpt", "bitnet", "codegen", "cohere2", "diffllama", "doge", "dots1", "ernie4_5"),
            *("exaone", "exaone_moe", "flex_olmo", "gemma", "glm", "glm4_moe", "gpt_bigcode", "granitemoe", "helium"),
            *(
                "hunyuan_v1_dense",
                "hunyuan_v1_moe",
                "internlm3",
                "minimax_m2",
                "ministral3",
                "modernbert-decoder",
                "mpt",
            ),
            *("nanochat", "nemotron", "olmo", "olmoe", "persimmon", "phi", "phimoe", "vaultgemma", "xglm"),
        )
    }
)
_WIDTHS = ("n_embd", "d_model")
_DEPTHS = ("n_layer", "n_layers", "num_layers")
_HEADS = ("n_head", "n_heads", "attention_heads")
_INNER = ("n_inner", "ffn_dim")
_LENGTHS = ("n_positions", "max_seq_len")
_FOURS = ("rotary_dim", "num_experts", "n_routed_experts")
_TWOS = ("num_experts_per_tok", "n_group")
_ONES = ("topk_group", "n_shared_experts", "first_k_dense_replace")
ANY = {
    **LLAMA,
    **dict.fromkeys(_WIDTHS, 32),
    **dict.fromkeys(_DEPTHS, NUM_LAYERS),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_INNER, 48),
    **dict.fromkeys(_LENGTHS, 64),
    **dict.fromkeys(_FOURS, 4),
    **dict.fromkeys(_TWOS, 2),
    **dict.fromkeys(_ONES, 1),
    **{"sliding_window": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
}

# Encoders: masked LMs, whose layers see both sides.
_BERT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": NUM_LAYERS,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
PRE_NORM = ("eurobert", "megatron-bert", "modernbert", "roberta-prelayernorm")  # the others: norm after the sum
ENCODERS: dict[str, dict] = {
    "bert": _BERT,
    "roberta": _BERT,
    "modernbert": {**_BERT, "local_attention": 6, "global_attn_every_n_layers": 2},
    "camembert": _BERT,
    "data2vec-text": _BERT,
    "distilbert": {"dim": 32, "hidden_dim": 48, "n_layers": NUM_LAYERS, "n_heads": 4, "max_position_embeddings": 64},
    "electra": {**_BERT, "embedding_size": 16},
    "ernie": _BERT,
    "eurobert": {**_BERT, "head_dim": 8, "num_key_value_heads": 2},
    "megatron-bert": _BERT,
    "roberta-prelayernorm": _BERT,
    "xlm-roberta": _BERT,
}

# Refused with a reason.
REFUSED: dict[str, dict] = {
    "mistral_large4_text": {**_MLA, "kv_source_layers": [0, 1, 1, 1]},
    "recurrent_gemma": {"lru_width": 32, "attention_window_size": 6, "block_types": ["recurrent", "attention"] * 2},
    "rwkv": {},
    "t5": {"d_model": 32, "num_layers": NUM_LAYERS, "num_heads": 4},
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid"] * (NUM_LAYERS // 2),
        **{"n_mamba_heads": 4, "mamba_d_state": 8, "chunk_size": 4, "adapter_rank": 4},
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}


_REFUSED_HERE = set() if CACHES_FOLLOW_STATES else {*STATEFUL, *OTHER_STATEFUL}
for _rows in (ARCHITECTURES, STATEFUL, PLAIN, OTHER_STATEFUL, OTHERS, REFUSED):
    for _name in (_rows.keys() - CONFIG_MAPPING.keys()) | (_rows.keys() & _REFUSED_HERE):  # by this transformers
        del _rows[_name]


def in_matrix(*model_types: str) -> list[str]:
    """Those of the architectures that are tried with this release of transformers."""
    return [each for each in model_types if each in ARCHITECTURES or each in OTHERS or each in ENCODERS]


# Tried under each head that transformers has for them.
HEADED = ("llama", "gpt2", "bert", "qwen3", "gemma2", "mixtral", "opt", "falcon", "modernbert", "gpt_neox")

FAST = ("gpt2", "llama", "bert")  # of the architectures, those that `make test-fast` tries
# Those that `make test` tries with everything; each of the others with a few operations.
BROAD = ("gpt2", "llama", "qwen3_moe", "gemma3_text", "modernbert", "bert", "gpt_oss", "mamba2", "qwen3_next")


def exhaustive(model_type: str) -> list[pytest.MarkDecorator]:
    """The mark of what is tried with one more architecture, and left to `make test-exhaustive`."""
    return [] if model_type in BROAD else [pytest.mark.exhaustive]


def broadly(model_types: Iterable[str]) -> pytest.MarkDecorator:
    """Run a test with each architecture as `model_type`; `make test` leaves out all but a few."""
    groups = {each: pytest.mark.xdist_group(each) for each in model_types}
    return pytest.mark.parametrize(
        "model_type", [pytest.param(each, marks=[group, *exhaustive(each)]) for each, group in groups.items()]
    )


def first_of(cases: Iterable[tuple[Any, ...]]) -> list[Any]:
    """Cases of a test, of which all but the first are left to `make test-exhaustive`."""
    first, *others = cases
    return [first, *(pytest.param(*each, marks=pytest.mark.exhaustive) for each in others)]
