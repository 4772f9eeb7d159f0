"""What an organ in an encoder learns, against LoRA and full fine-tuning with the same steps.

    python benchmarks/encoders.py            # two encoders, a few minutes on two cores (make bench-encoders)
    python benchmarks/encoders.py --quick    # smaller and shorter, for the test suite

A small BERT (norms after the sum) and a small ModernBERT (norms before it) are trained from scratch as masked LMs on
source code of Python's standard library; then each method gets the same number of steps on the King James Bible, once
per learning rate, and keeps the rate that was best on chapters set aside for that. Reported is the loss on masked
tokens, in nats, of other held-out chapters (domain) and of held-out source code (control). One seed.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import sys
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForMaskedLM, PreTrainedModel, set_seed

from not_hf import DonorModel, TransplantedForMaskedLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the texts, and the commit, versions and hardware, as in its own results)

SIZES = {
    "full": {"width": 96, "vocab": 1024, "pretrain": 120, "steps": 30, "batch": 32, "rates": (3e-3,), "held": 8},
    "quick": {
        **{"width": 32, "vocab": 512, "pretrain": 4, "steps": 2, "batch": 4, "rates": (1e-3,), "held": 2},
        "texts": 60,  # of each kind
    },
}
SEQ, NUM_LAYERS, SPAN = 64, 6, (3, 5)
SPECIAL = ["<pad>", "<s>", "</s>", "<mask>"]
MASK = SPECIAL.index("<mask>")
ENCODERS: dict[str, dict[str, Any]] = {
    "bert": {},
    "modernbert": {"local_attention": 32, "global_attn_every_n_layers": 3},
}

Rows = torch.Tensor  # token ids, (rows, SEQ)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="Organs in encoders against LoRA and full fine-tuning.")
    parser.add_argument("--quick", action="store_true", help="small and short, for the test suite")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    commit, size = demo.commit(), SIZES["quick" if options.quick else "full"]
    data = read_data(size)
    found = {model_type: compare(model_type, size, data) for model_type in ENCODERS}
    result = {"size": size, "encoders": found, "commit": commit, **demo.provenance(__file__)}
    print(f"{'encoder':12}{'method':16}{'rate':>8}{'trained':>10}{'domain':>9}{'control':>9}{'seconds':>9}")
    for model_type, methods in found.items():
        for method, row in methods.items():
            rate = row["rate"] or "-"
            print(
                f"{model_type:12}{method:16}{rate:>8}{row['trained']:>10,}{row['domain']:>9.3f}{row['control']:>9.3f}"
                f"{row['seconds']:>9.1f}"
            )
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(result, indent=2) + "\n")
    return result


def read_data(size: dict[str, Any]) -> dict[str, Rows]:
    """Rows of token ids by their use; every tenth text is held out, for choosing a rate and for testing in turn."""
    modules = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    texts = {"code": [path.read_text("utf-8") for path in modules], "bible": demo.bible_chapters()}
    texts = {name: all_[: size.get("texts")] for name, all_ in texts.items()}
    kept = {name: [text for n, text in enumerate(all_) if n % 10] for name, all_ in texts.items()}
    held = {name: all_[::10] for name, all_ in texts.items()}
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel()
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=size["vocab"], special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(kept["code"] + kept["bible"], trainer)

    def rows(texts: list[str], most: int | None = None) -> Rows:
        ids = [n for encoded in tokenizer.encode_batch(texts) for n in encoded.ids]
        return torch.tensor(ids[: len(ids) // SEQ * SEQ]).view(-1, SEQ)[:most]

    most = size["held"] * 8
    return {
        "pretrain": rows(kept["code"]),
        "train": rows(kept["bible"]),
        "choose": rows(held["bible"][1::2], most),
        "domain": rows(held["bible"][::2], most),
        "control": rows(held["code"], most),
    }


def masked(rows: Rows, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Inputs with 15 % of the tokens masked, and labels for these alone; both `(batch, SEQ)`."""
    chosen = torch.rand(rows.shape, generator=generator) < 0.15
    return {"input_ids": rows.masked_fill(chosen, MASK), "labels": rows.masked_fill(~chosen, -100)}


def train(model: Any, rows: Rows, steps: int, batch: int, rate: float) -> float:
    """AdamW with a linear decay; the same rows and masks for every method. Returns seconds."""
    start, generator = time.perf_counter(), torch.Generator().manual_seed(0)
    set_seed(0)
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trainable, lr=rate)
    warmup = max(1, steps // 10)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, (steps - n) / max(1, steps - warmup))
    )
    model.train()
    for _ in range(steps):
        picked = rows[torch.randint(len(rows), (batch,), generator=generator)]
        model(**masked(picked, generator)).loss.backward()
        torch.nn.utils.clip_grad_norm_(trainable, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.eval()
    return time.perf_counter() - start


@torch.no_grad()
def loss(model: Any, rows: Rows) -> float:
    """Mean loss on masked tokens, in nats; the same masks for every model."""
    generator, total, count = torch.Generator().manual_seed(1), 0.0, 0
    for part in rows.split(64):
        batch = masked(part, generator)
        num_masked = int((batch["labels"] != -100).sum())
        total += float(model(**batch).loss) * num_masked
        count += num_masked
    return total / count


def pretrained(model_type: str, size: dict[str, Any], rows: Rows) -> PreTrainedModel:
    """A small encoder, trained from scratch."""
    config = AutoConfig.for_model(
        model_type,
        **{"vocab_size": size["vocab"], "hidden_size": size["width"], "intermediate_size": 4 * size["width"]},
        **{"num_hidden_layers": NUM_LAYERS, "num_attention_heads": 4, "max_position_embeddings": SEQ},
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "cls_token_id": 1, "sep_token_id": 2},
        **ENCODERS[model_type],
    )
    set_seed(0)
    model = AutoModelForMaskedLM.from_config(config)
    train(model, rows, size["pretrain"], size["batch"], 2e-3)
    return model


def compare(model_type: str, size: dict[str, Any], data: dict[str, Rows]) -> dict[str, dict[str, Any]]:
    """Every method on one encoder, from the same start."""
    base = pretrained(model_type, size, data["pretrain"])

    def organ(mode: str, init: str = "copy") -> Callable[[], Any]:
        donor = DonorModel.from_base(base, SPAN, mode=mode, init=init)
        return lambda: TransplantedForMaskedLM.from_pretrained(copy.deepcopy(base), donor, is_trainable=True)

    def lora() -> Any:
        return get_peft_model(copy.deepcopy(base), LoraConfig(r=16, lora_alpha=32, target_modules="all-linear"))

    methods: dict[str, Callable[[], Any]] = {
        "organ, replace": organ("replace"),
        "organ, insert": organ("insert", "identity" if model_type == "modernbert" else "copy"),
        "LoRA, r = 16": lora,
        "full": lambda: copy.deepcopy(base).requires_grad_(True),
    }
    found = {"base": row(base, data)}
    for method, make in methods.items():
        best: dict[str, Any] = {"choose": math.inf}
        for rate in size["rates"]:
            model = make()
            start = loss(model.eval(), data["domain"])
            seconds = train(model, data["train"], size["steps"], size["batch"], rate)
            now = row(model, data, rate, seconds, start)
            best = min(best, now, key=lambda each: each["choose"])
        found[method] = best
    return found


def row(
    model: Any, data: dict[str, Rows], rate: float | None = None, seconds: float = 0.0, start: float | None = None
) -> dict[str, Any]:
    """What is reported of one model."""
    model.eval()
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad) if rate else 0
    losses = {name: loss(model, data[name]) for name in ("choose", "domain", "control")}
    return {**losses, "domain_at_start": start, "rate": rate, "trained": trained, "seconds": seconds}


if __name__ == "__main__":
    main()
