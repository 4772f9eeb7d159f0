"""Trained on one text, measured on others: do organs lose less there than LoRA, and is it more than a smaller step?

    python benchmarks/paper/cross_domain.py [--base NAME]     # the names are in bases.py; 40 core-minutes of SmolLM2
    python benchmarks/paper/cross_domain.py --quick           # two methods, few steps: two minutes
    python benchmarks/paper/cross_domain.py --smoke           # a small random model, for the test suite
    python benchmarks/paper/cross_domain.py --report          # train nothing: answer and picture of the runs so far

The paper (arXiv 2601.13580) sees "unexpected regularization benefits" of organs in cross-domain transfer: they do
better than LoRA and full fine-tuning on texts that they were not trained on. But so does anything that has changed the
model less. So each method is trained on King James, with the same steps and the rate that `against_lora.py` found best
for it on this base, and is then moved back along its scale: to base + scale · (trained − base), an inserted organ to
that share of what its layers write. Measured are medical codes and the English encyclopedia, on which nothing was
trained, and they are compared three times:

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
import math
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import equal_time
from against_lora import COMPARED, FAIR, longer
from distance import curves_of, divergences
from pictures import finish, panels_of
from question import Runs, concluded, markdown, opened, parser_of, spread

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import INSERTED, METHODS, REFERENCE, fit, mean, prepare, row_losses  # noqa: E402
from record import is_one_run  # noqa: E402 (from the folder above, like those around it)
from tables import OUTPUTS  # noqa: E402
from texts import read_blocks  # noqa: E402

TRAINED, OTHERS = "kjv", ("icd10", "english")
FULL: dict[str, Any] = {
    "methods": COMPARED, "seeds": 3, "steps": 24, "batch": 2, "block": 128, "held": 64,
    "distance": 16, "scales": (0.5, 1.0),
}  # fmt: skip
QUICK = {**FULL, "methods": (INSERTED, REFERENCE), "seeds": 1, "steps": 4, "held": 8, "distance": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": QUICK,
    "smoke": {**QUICK, "methods": COMPARED, "block": 32, "held": 2},
}
WAYS = ("as trained", "at equal distance", "at equal gain")


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, compare, answer."""
    options = parser_of(__file__, "Trained on one text, measured on others.", FORMS).parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    with opened(options, run_once) as (record, pool):
        if not options.report:
            run_all(record, FORMS[options.form], options.base, pool)
    return concluded(record, options, find, answer, draw)


def run_all(record: Any, size: dict[str, Any], base: str, pool: ThreadPoolExecutor) -> None:
    """Train each method with each seed."""
    rates = best_rates(base, record.path)
    given = {name: size[name] for name in ("batch", "block", "held", "distance", "scales")}
    given["steps"] = size["steps"] * longer(base)
    methods = [name for name in size["methods"] if (base, name) != ("gemma", INSERTED)]

    def train(each: tuple[int, str]) -> None:
        seed, method = each
        record(method=method, rate=rates[method], seed=seed, **given)

    list(pool.map(train, [(seed, method) for seed in range(size["seeds"]) for method in methods]))


def best_rates(base: str, path: Path | None) -> dict[str, float]:
    """For each method the rate that `against_lora.py` found best on this base; else the middle one of those tried."""
    rates = {name: method.settings[len(method.settings) // 2][0] for name, method in METHODS.items()}
    swept = path and path.with_name("against_lora.json")
    if swept and swept.exists():
        found = json.loads(swept.read_text("utf-8"))["found"]
        rates |= {name: each[FAIR] for of in found if of["base"] == base for name, each in of["rates"].items()}
    return rates


def run_once(
    base: str, method: str, rate: float, seed: int, steps: int, batch: int, block: int, held: int, distance: int,
    scales: list[float],
) -> dict[str, Any]:  # fmt: skip
    """Train, then measure losses of each text (nats per token) and the distance from the base at each scale."""
    import torch
    from transformers import AutoTokenizer

    read_text = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    rows = read_text(TRAINED, most=steps * batch, part="train", seed=seed).tolist()
    texts = {name: read_text(name, most=held, part="test") for name in (TRAINED, *OTHERS)}
    torch.manual_seed(seed)
    prepared = prepare(method, base)
    fit(prepared, [(row, row) for row in rows], rate=rate, batch=batch, steps=steps, seed=seed)
    places = {}
    for scale in (0.0, *scales):
        prepared.set_scale(scale)
        places[f"{scale:g}"] = {name: mean(row_losses(prepared.model, rows)) for name, rows in texts.items()}
    for scale, divergence in divergences(prepared, texts[OTHERS[-1]][:distance], scales).items():
        places[scale]["distance"] = divergence
    return {"places": {"0": {**places.pop("0"), "distance": 0.0}, **places}}


def find(runs: Runs) -> list[dict[str, Any]]:
    """For each run its places, and the losses of all texts where it is compared with the others of its seed."""
    import numpy as np

    found = []
    for group in dict.fromkeys((run["given"]["base"], run["given"]["seed"]) for run in runs):
        mine = [run for run in runs if (run["given"]["base"], run["given"]["seed"]) == group]
        curves = [curves_of(run["places"]) for run in mine]
        distance, gain = min(each["distance"][-1] for each in curves), max(each[TRAINED].min() for each in curves)
        for run, curve in zip(mine, curves, strict=True):
            at = (-1, int(np.argmax(curve["distance"] >= distance)), int(np.argmax(curve[TRAINED] <= gain)))
            losses = [{name: float(curve[name][n]) for name in (TRAINED, *OTHERS)} for n in at]
            given = {name: run["given"][name] for name in ("base", "method", "seed", "rate")}
            found.append({**given, "places": run["places"], "losses": dict(zip(WAYS, losses, strict=True))})
    return found


def answer(found: list[dict[str, Any]]) -> str:
    """Organs against LoRA and full fine-tuning as a table for each base, and what it says."""
    bases = dict.fromkeys(run["base"] for run in found)
    return "\n\n".join(answer_of([run for run in found if run["base"] == base]) for base in bases)


def answer_of(runs: list[dict[str, Any]]) -> str:
    """The answer for a base."""
    losses = {(run["method"], run["seed"]): run["losses"] for run in runs}
    methods, seeds = (dict.fromkeys(run[name] for run in runs) for name in ("method", "seed"))
    pairs = [(organ, other) for organ in (INSERTED, OUTPUTS) for other in (REFERENCE, "full")]
    pairs = [pair for pair in pairs if methods.keys() >= set(pair)]
    rows, ahead, kept = [], dict.fromkeys(WAYS, 0), 0
    for text in OTHERS:
        for pair in pairs:
            gaps = []
            for way in WAYS:
                mine, others = ([losses[method, seed][way][text] for seed in seeds] for method in pair)
                gaps.append([a - b for a, b in zip(mine, others, strict=True)])
                ahead[way] += max(gaps[-1]) < 0
            kept += max(map(max, gaps)) < 0
            rows.append([f"{text}: {' − '.join(pair)}", *(spread(each, 3) for each in gaps)])
    before = ", ".join(f"{name} {math.exp(runs[0]['places']['0'][name]):.2f}" for name in (TRAINED, *OTHERS))
    words = [
        f"Of {len(rows)} comparisons, the organ has the smaller loss with every seed in",
        ", ".join(f"{ahead[way]} {way}" for way in WAYS) + f"; {kept} hold all three ways:",
        "the paper's regularization does not show."
        if not ahead[WAYS[0]]
        else "what shows of the paper's regularization is a smaller step away from the base."
        if not kept
        else f"{kept} of {ahead[WAYS[0]]} advantages are more than a smaller step away from the base.",
        equal_time.forgotten() if runs[0]["base"] == "smollm2" else "",
    ]
    title = f"{runs[0]['base']}, trained on {TRAINED}; perplexity before: {before}."
    heads = ["loss of the organ − the other's, nats per token", *WAYS]
    return f"{title}\n\n{markdown(heads, rows)}\n\n{' '.join(words).strip()}"


def draw(found: list[dict[str, Any]], path: Path) -> None:
    """Perplexity of each text over the distance from the base, along the scale; a row of panels for each base."""
    bases, methods = (list(dict.fromkeys(run[name] for run in found)) for name in ("base", "method"))
    texts = (TRAINED, *OTHERS)
    figure, panels = panels_of(len(bases), len(texts))
    for base, row in zip(bases, panels, strict=True):
        for panel, text in zip(row, texts, strict=True):
            for run in (run for run in found if run["base"] == base):
                points = sorted((place["distance"], math.exp(place[text])) for place in run["places"].values())
                color = f"C{methods.index(run['method'])}"
                panel.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1, label=run["method"])
            panel.set(xlabel="KL from the base on english, nats per token", ylabel="perplexity")
            panel.set_title(f"{base}: {text}{' (trained)' if text == TRAINED else ''}", loc="left", fontsize="medium")
    finish(figure, path)


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
