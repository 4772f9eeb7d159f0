"""Trained on one text, measured on others: do organs lose less there than LoRA, and is it more than a smaller step?

    python benchmarks/paper/cross_domain.py [--base NAME]     # names: bases.py; an hour of one core for SmolLM2
    python benchmarks/paper/cross_domain.py --quick           # two methods, few steps: two minutes
    python benchmarks/paper/cross_domain.py --smoke           # a small random model, for the test suite
    python benchmarks/paper/cross_domain.py --report          # train nothing: answer and picture of the runs so far

The paper (arXiv 2601.13580) sees "unexpected regularization benefits" of organs in cross-domain transfer: they do
better than LoRA and full fine-tuning on texts that they were not trained on. But so does anything that has changed
the model less. So each method is trained on King James for the same number of steps, with the rate that
`against_lora.py` found best for it on this base in half as many, and is then moved back along its scale: to base +
scale · (trained − base), an inserted organ to that share of what its layers write. Measured are medical codes and the
English encyclopedia, on which nothing was trained, and they are compared three times:

- as trained;
- at equal distance: where the KL divergence of the predictions from the base's, on the encyclopedia, is that of the
  method that has moved least;
- at equal gain: where the loss on held-out King James is that of the method that has learned least.

Between the scales that were measured, lines are straight. An advantage that is there as trained only is that of a
smaller step. `train.py` has measured the third comparison on three texts at equal time; its figures are read, not run
again. In Gemma, whose norms undo the scale of an inserted organ, that one is left out.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from against_lora import longer
from against_lora_report import FAIR
from bases import middle_rate
from cross_domain_report import OTHERS, TRAINED, details, draw, find, headline
from distance import divergences
from question import ask, parser_of, size_of

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from figures import OUTPUTS  # noqa: E402
from methods import INSERTED, METHODS, REFERENCE, fit, load, mean, prepare, row_losses  # noqa: E402
from texts import read_blocks  # noqa: E402

FULL: dict[str, Any] = {
    "methods": (INSERTED, OUTPUTS, REFERENCE, "full"), "seeds": 3, "steps": 24, "batch": 2, "block": 128, "held": 64,
    "distance": 16, "scales": (0.5, 1.0),
}  # fmt: skip
QUICK = {**FULL, "methods": (INSERTED, REFERENCE), "seeds": 1, "steps": 4, "held": 8, "distance": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": QUICK,
    "smoke": {**QUICK, "methods": FULL["methods"], "block": 32, "held": 2},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, compare, answer."""
    parser = parser_of(__file__, "Trained on one text, measured on others.", FORMS)
    return ask(parser, arguments, run_once, run_all, (find, headline, details, draw))


def run_all(record: Any, options: Any, pool: Any) -> None:
    """Measure the base, then train each method with each seed."""
    size, base = size_of(options, FORMS), options.base
    rates = best_rates(base, record.path, needed=options.form == "full")
    given = {name: size[name] for name in ("batch", "block", "held", "distance", "scales")}
    given["steps"] = size["steps"] * longer(base)
    methods = [name for name in size["methods"] if (base, name) != ("gemma", INSERTED)]
    record(method=None, rate=0.0, seed=0, **given)

    def train(each: tuple[int, str]) -> None:
        seed, method = each
        record(method=method, rate=rates[method], seed=seed, **given)

    list(pool.map(train, [(seed, method) for seed in range(size["seeds"]) for method in methods]))


def best_rates(base: str, path: Path | None, needed: bool) -> dict[str, float]:
    """The rate of each method that `against_lora.py` found best on this base; where not needed, the middle one."""
    swept = path and path.with_name("against_lora.json")
    found = json.loads(swept.read_text("utf-8")).get("found", []) if swept and swept.exists() else []
    best = {name: each[FAIR] for of in found if of["base"] == base for name, each in of["rates"].items()}
    if needed and not best:
        raise SystemExit(f"the rates of {base} are not known; run against_lora.py first, into the same folder")
    return {name: middle_rate(base, name) for name in METHODS} | best


def run_once(
    base: str, method: str | None, rate: float, seed: int, steps: int, batch: int, block: int, held: int,
    distance: int, scales: list[float],
) -> dict[str, Any]:  # fmt: skip
    """Train, then measure losses of each text (nats per token) and distance at each scale; `None`: of the base."""
    import torch
    from transformers import AutoTokenizer

    read_text = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    texts = {name: read_text(name, most=held, part="test") for name in (TRAINED, *OTHERS)}

    def losses(model: Any) -> dict[str, float]:
        return {name: mean(row_losses(model, rows)) for name, rows in texts.items()}

    if method is None:
        return {"places": {"0": {**losses(load(base)), "distance": 0.0}}}
    rows = read_text(TRAINED, most=steps * batch, part="train", seed=seed).tolist()
    torch.manual_seed(seed)
    prepared = prepare(method, base)
    fit(prepared, [(row, row) for row in rows], rate=rate, batch=batch, steps=steps, seed=seed)
    places = {}
    for scale, divergence in divergences(prepared, texts[OTHERS[-1]][:distance], scales).items():
        prepared.set_scale(float(scale))
        places[scale] = {**losses(prepared.model), "distance": divergence}
    return {"places": places}


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
