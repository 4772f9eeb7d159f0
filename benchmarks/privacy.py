"""What an organ, LoRA and full fine-tuning give away of the rows that they learned, at equal perplexity of the domain.

    python benchmarks/privacy.py            # one seed: two hours of one core (make bench-privacy)
    python benchmarks/privacy.py --quick    # fewer rows, one epoch, own recipient only: half an hour
    python benchmarks/privacy.py --smoke    # a small random model, for the test suite

Each method learns every other block of King James, drawn by lot, with canaries among them that stand there 1, 10 and
100 times, and others that are held back. All see the same rows in the same order, each at the middle one of the
learning rates that `train.py` tries. `probe_privacy` then attacks what was learned as it is, and at equal domain loss:
weights are moved to base + scale · (trained − base), with the smallest scale at which the loss on other chapters is as
low as the best one of the method that learns least. The organ is also attacked in another fine-tune of the base, and
in the base with random weights in its own layers. Each training and each attack is a process of its own, with one
thread; what was trained is kept beside the base for the attacks. What is in the output file is not run again.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from methods import METHODS, REFERENCE, Prepared, fit, load, mean, prepare, row_losses, spread
from record import is_one_run, opened, parser_of
from texts import read_blocks
from train import CONTROL

DOMAIN = "kjv"
ORGAN, FULL = "organ, outputs", "full"
COMPARED = [ORGAN, REFERENCE, FULL]
SCALES = [0.0, 0.3, 0.5, 0.7, 0.85, 1.0]
AS_TRAINED, EQUAL = "as trained", "at equal loss"
FORMS: dict[str, dict[str, Any]] = {
    "full": {
        "members": 256, "others": 256, "block": 64, "epochs": 2, "repetitions": [0, 1, 10, 100], "num_each": 2,
        "held": 64, "candidates": 127, "tune": 16,
    },
    "quick": {
        "members": 100, "others": 100, "block": 64, "epochs": 1, "repetitions": [0, 1, 10, 100], "num_each": 1,
        "held": 8, "candidates": 63, "tune": 0,
    },
    "smoke": {
        "members": 20, "others": 100, "block": 32, "epochs": 1, "repetitions": [0, 1, 3], "num_each": 1,
        "held": 4, "candidates": 15, "tune": 1,
    },
}  # fmt: skip


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, attack, print the tables, write the numbers and the picture."""
    parser = parser_of("What fine-tuned models give away of their training rows.", FORMS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=COMPARED)
    parser.add_argument("--seeds", type=int, default=1, help="how many (one)")
    options = parser.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    size, seeds = FORMS[options.form], options.seeds
    with opened(__file__, options, run_once) as (record, pool):
        found = [of_seed(record, size, options.methods, seed, pool.map) for seed in range(seeds)]
    record.save(form=options.form, seeds=seeds)
    print(tables(found))
    if options.output:
        draw(found, options.output.with_suffix(".png"))
    return {"seeds": found}


def of_seed(
    run: Callable[..., dict[str, Any]], size: dict[str, Any], methods: list[str], seed: int, each: Any = map
) -> dict[str, Any]:
    """Train every method, choose the scales, and attack.

    Args:
        run: Makes a run, or looks it up.
        each: Calls a function for each of several values, as `map` does.

    Returns:
        `before`, the loss of the base, and of each method what was found, at equal loss and as trained.
    """

    def make(method: str, scale: float | None, tune: int = 0) -> dict[str, Any]:
        return run(**{**size, "seed": seed, "method": method, "scale": scale, "tune": tune})

    losses = [found["losses"][DOMAIN] for found in each(lambda method: make(method, None), methods)]
    goal = max(map(min, losses))
    equal = {method: scale_at(goal, own) for method, own in zip(methods, losses, strict=True)}
    tune = {method: size["tune"] if METHODS[method].donor_trainer else 0 for method in methods}
    attacks = [(method, scale, tune[method]) for method, scale in equal.items()]
    attacks += [(method, 1.0, 0) for method, scale in equal.items() if scale < 1]
    found = {of[:2]: attacked for of, attacked in zip(attacks, each(lambda of: make(*of), attacks), strict=True)}
    return {
        "before": losses[0][0],
        "methods": {
            method: {EQUAL: found[method, scale], AS_TRAINED: found[method, 1.0]} for method, scale in equal.items()
        },
    }


def run_once(
    base: str, method: str, seed: int, scale: float | None, members: int, others: int, block: int, epochs: int,
    repetitions: list[int], num_each: int, held: int, candidates: int, tune: int,
) -> dict[str, Any]:  # fmt: skip
    """Train a method, or attack what it learned.

    Args:
        scale: At which it is attacked; `None`: train, and measure the loss at several scales.
        members: Blocks that are learned.
        others: Blocks of the same chapters, which are not.
        num_each: Canaries for each of the repetitions.
        held: Blocks that the loss is measured on.
        candidates: Random secrets that a canary is ranked among.
        tune: Steps of the other fine-tune, on general text; 0: organs are attacked in their own recipient only.
    """
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    from not_hf import plant_canaries

    tokenizer = AutoTokenizer.from_pretrained(base)
    blocks = read_blocks(DOMAIN, tokenizer, block, members + others, part="train", seed=seed).tolist()
    own, unseen = blocks[:members], blocks[members:]  # drawn by lot from the same chapters
    texts = {name: read_blocks(name, tokenizer, block, held, part="choose") for name in (DOMAIN, CONTROL)}
    _, canaries = plant_canaries([], repetitions, num_each=num_each, seed=seed)
    copies = [tokenizer(each.text)["input_ids"] + [tokenizer.eos_token_id] for each in canaries]
    rows = [*own, *(row for row, each in zip(copies, canaries, strict=True) for _ in range(each.repetitions))]
    random.Random(seed).shuffle(rows)

    def trained(method: str, rows: list[list[int]], steps: int | None = None) -> Prepared:
        torch.manual_seed(seed)
        settings = METHODS[method].settings
        rate, batch = settings[len(settings) // 2]
        prepared = prepare(method, base)
        pairs = [(row, row) for row in rows]
        fit(prepared, pairs, rate=rate, batch=batch, steps=steps or epochs * len(rows) // batch, seed=seed)
        return prepared

    key = json.dumps([method, seed, members, others, block, epochs, repetitions, num_each])
    kept = Path(base, "trained", f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.safetensors")
    if scale is None or not kept.exists():
        prepared = trained(method, rows)
        kept.parent.mkdir(exist_ok=True)
        weights = {name: each.detach() for name, each in prepared.model.named_parameters() if each.requires_grad}
        save_file(weights, kept)
    else:
        prepared = prepare(method, base)
        prepared.model.load_state_dict(load_file(kept), strict=False)
    if scale is None:
        return {"tokens": sum(map(len, rows)), "scales": SCALES, "losses": losses_at(SCALES, prepared, texts)}
    elsewhere: dict[str, Any] = {}
    if tune:
        general = read_blocks(CONTROL, tokenizer, block, 4 * tune, part="train", seed=seed).tolist()
        tuned = trained(FULL, general, tune).model
        elsewhere = {"recipients": {"another fine-tune": tuned}, "with_random_layers": True}
    pair = [[{"input_ids": row} for row in some] for some in (own, unseen)]
    how = {"tokenizer": tokenizer, "num_candidates": candidates, "prefix_length": block // 4, "seed": seed}
    return attack(prepared, scale, texts, pair, {"canaries": canaries, **how}, elsewhere)


def attack(
    prepared: Prepared, scale: float, texts: dict[str, Any], pair: list[Any], how: dict[str, Any],
    elsewhere: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """Attack what a method learned, at a scale; an organ by its file, elsewhere too.

    Args:
        prepared: What was trained.
        scale: The scale.
        texts: Rows that the loss is measured on, by the name of the text.
        pair: Members and non-members.
        how: For `probe_privacy`, of any method.
        elsewhere: For `probe_privacy`, of an organ.
    """
    from not_hf import probe_privacy

    losses, base = losses_at([scale], prepared, texts), load(prepared.base)
    with tempfile.TemporaryDirectory() as folder:
        if prepared.method.donor_trainer:
            prepared.model.save_pretrained(folder)
            probe = probe_privacy(folder, *pair, base=base, **how, **elsewhere)
        else:
            probe = probe_privacy(prepared.model, *pair, reference=base, **how)
    tables = {name: getattr(probe, name) for name in ("attacks", "extraction", "canaries")}
    return {"losses": {name: each[0] for name, each in losses.items()}, **tables}


def losses_at(scales: list[float], prepared: Prepared, texts: dict[str, Any]) -> dict[str, list[float]]:
    """Losses on each text (nats per token) at each scale."""
    found: dict[str, list[float]] = {name: [] for name in texts}
    for scale in scales:
        prepared.set_scale(scale)
        for name, rows in texts.items():
            found[name].append(mean(row_losses(prepared.model, rows)))
    return found


def scale_at(goal: float, losses: list[float]) -> float:
    """The smallest scale at which the loss is that low, linear between those that were measured."""
    end = next(n for n, loss in enumerate(losses) if loss <= goal)
    if end == 0:
        return SCALES[0]
    high, low = losses[end - 1], losses[end]
    return round(SCALES[end - 1] + (SCALES[end] - SCALES[end - 1]) * (high - goal) / (high - low), 4)


def tables(runs: list[dict[str, Any]]) -> str:
    """Attacks and canaries as Markdown; of several seeds the median, with the smallest and the largest behind it."""
    base = math.exp(statistics.median(run["before"] for run in runs))
    titles = ("attacked", "scale", "domain", "AUC, loss", "AUC, reference", "TPR, reference", "repeated", "of others")
    counts = sorted({row["repetitions"] for row in canaries_of(runs[0], *cases(runs[0])[0])})
    titles += tuple(f"exposure, {count}×" for count in counts) + tuple(f"completed, {count}×" for count in counts)
    lines = [f"Perplexity of the domain before: {base:.2f}", "", f"| {' | '.join(titles)} |"]
    lines.append(f"| --- |{' ---: |' * (len(titles) - 1)}")
    for method, what, recipient in cases(runs[0]):

        def middle(value: Callable[[dict[str, Any]], float], form: str) -> str:
            return spread(list(map(value, runs)), form)

        def part(run: dict[str, Any], name: str, kind: tuple[str, str], of: tuple[str, str, str]) -> dict[str, Any]:
            rows = run["methods"][of[0]][of[1]][name]
            return next(row for row in rows if row["recipient"] == of[2] and row[kind[0]] == kind[1])

        of = (method, what, recipient)
        is_own = recipient in ("its own", "as given")
        cells = [f"{method}, {what}" if is_own else f"… in {recipient}"]
        cells.append(middle(lambda run, of=of: run["methods"][of[0]][of[1]]["given"]["scale"], ".2f"))
        cells.append(
            middle(lambda run, of=of: math.exp(run["methods"][of[0]][of[1]]["losses"][DOMAIN]), ".2f")
            if is_own
            else "–"
        )
        for attack, number in (("loss", "auc"), ("reference", "auc"), ("reference", "tpr")):
            kind = ("attack", attack)
            cells.append(middle(lambda run, k=kind, n=number, of=of: part(run, "attacks", k, of)[n], ".3f"))
        for side in ("members", "non-members"):
            cells.append(middle(lambda run, s=side, of=of: part(run, "extraction", ("rows", s), of)["share"], ".1%"))
        for number, form in (("exposure", ".1f"), ("is_completed", ".0%")):
            for count in counts:
                cells.append(middle(lambda run, n=number, c=count, of=of: over_canaries(run, n, c, of), form))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def cases(run: dict[str, Any]) -> list[tuple[str, str, str]]:
    """What was attacked: the method, at which scale, in which recipient."""
    return [
        (method, what, recipient)
        for method, scales in run["methods"].items()
        for what, found in scales.items()
        for recipient in dict.fromkeys(row["recipient"] for row in found["attacks"])
    ]


def canaries_of(run: dict[str, Any], method: str, what: str, recipient: str) -> list[dict[str, Any]]:
    """The canaries of a case."""
    return [row for row in run["methods"][method][what]["canaries"] if row["recipient"] == recipient]


def over_canaries(run: dict[str, Any], number: str, count: int, of: tuple[str, str, str]) -> float:
    """The mean of a number over the canaries that were planted so often."""
    return mean([float(row[number]) for row in canaries_of(run, *of) if row["repetitions"] == count])


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Exposure over how often canaries were planted, a panel for each scale."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.4), layout="constrained")
    for panel, what in zip(figure.subplots(1, 2, sharey=True), (AS_TRAINED, EQUAL), strict=True):
        for n, of in enumerate(case for case in cases(runs[0]) if case[1] == what):
            counts = sorted({row["repetitions"] for row in canaries_of(runs[0], *of)})
            values = [statistics.median(over_canaries(run, "exposure", count, of) for run in runs) for count in counts]
            name = of[0] if of[2] in ("its own", "as given") else f"{of[0]}, in {of[2]}"
            panel.plot(range(len(counts)), values, color=f"C{n}", marker="o", label=name)
            panel.set_xticks(range(len(counts)), [str(count) for count in counts])
        panel.set_xlabel("times planted")
        panel.set_title(what, loc="left", fontsize="medium")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
        panel.legend(frameon=False, fontsize="small")
    figure.axes[0].set_ylabel("exposure, bits")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
