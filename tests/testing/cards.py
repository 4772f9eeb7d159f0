"""A config with everything that a card can tell."""

from __future__ import annotations

import re

from transformers import GPT2Config

from not_hf import DonorConfig

METRICS = {
    "domain_perplexity": {"before": 24.0, "after": 18.0},
    "control_perplexity": {"before": 30.0, "after": 30.3},
    "training": {"final": {"loss": 1.5}},
}


def make_config(**changes) -> DonorConfig:
    values = {
        "base_model_name_or_path": "openai-community/gpt2",
        "base_revision": "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        "layers": [4, 7],
        "position": 3,
        "base_config": GPT2Config().to_dict(),  # 12 layers, which gpt2 calls n_layer
        "domain": "King James English",
        "datasets": ["me/kjv", "data/kjv.jsonl"],
        "tokens_seen": 1_234_567,
        "metrics": METRICS,
    }
    return DonorConfig(**{**values, **changes})


def markup(text: str) -> list[str]:
    """What renderers make something of, outside of code."""
    ours = r"\]\(https://(?:huggingface\.co|arxiv\.org)/[^()\s]*\)"
    prose = re.sub(rf"```.*?```|`[^`\n]*`|{ours}", "", text, flags=re.DOTALL)
    found = re.findall(r"(?<!\\)<(?!!-- /?not_hf )\w+|(?<!\\)\]\(.*?\)", prose)
    return found + re.findall(r"(?<!\()https?://\S+|www\.\S+|\S+@\S+|[\x00-\x08\x0b-\x1f\x7f]", prose)
