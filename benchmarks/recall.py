"""Learning facts by heart: text that is seen many times, organs with a prefix cache against LoRA.

    python benchmarks/recall.py            # three sizes of text, three seeds of one: hours (make bench-recall)
    python benchmarks/recall.py --quick    # one size, two methods: ten minutes
    python benchmarks/recall.py --smoke    # a small random model, for the test suite

Medical codes with their meanings (ICD-10-CM), drawn by lot, are seen over and over in the same batches of 16, with the
loss on the meaning and a constant learning rate that is searched on other codes. After each epoch, and not counted in
the time, each code is given and its meaning asked for: as in training, and at the end in two other ways. Right is what
greedy decoding would write token by token, to the line's end. Training stops when 98 % are known. The control is the
loss on a general text. Time is processor seconds of training; each run is a process of its own with one thread. What
is in the output file is not run again.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from methods import METHODS, REFERENCE, SEARCH_SEED, fit, load, mean, prepare, row_losses, seconds_per_step
from record import is_one_run, opened, parser_of
from texts import documents, read_blocks

CONFINED = "LoRA, r = 16, upper half, cache"
ORGAN = "organ, upper half, cache"
WAYS = {"line": "\n{code}", "code means": "The ICD-10-CM code {code} means:", "question": "What is {code}? It is"}
FULL: dict[str, Any] = {
    "methods": [REFERENCE, CONFINED, ORGAN], "facts": [40, 80, 160], "main": 80, "seeds": 3, "epochs": 32,
    "search": 24, "block": 128, "control": 16,
}  # fmt: skip
SMALL = {**FULL, "methods": [REFERENCE, ORGAN], "facts": [40], "main": 40, "seeds": 1, "search": 0}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": SMALL,
    "smoke": {**SMALL, "facts": [6], "main": 6, "epochs": 4, "block": 32, "control": 2},
}
SHARES = (0.5, 0.9)
ENOUGH = 0.98  # share of the facts after which training stops
BATCH = 16


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Search rates, teach, ask, print the table, write the numbers and the picture."""
    parser = parser_of("Organs against LoRA on text that is seen many times.", FORMS)
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="beside LoRA of rank 16")
    parser.add_argument("--report", action="store_true", help="train nothing: table and picture of the runs so far")
    options = parser.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    size = FORMS[options.form]
    methods = [REFERENCE, *(name for name in options.methods or size["methods"] if name != REFERENCE)]
    with opened(__file__, options, run_once) as (record, pool):
        if not options.report:
            run_all(functools.partial(record, block=size["block"], control=size["control"]), size, methods, pool)
    runs = [run for run in record.runs.values() if run["given"]["method"] and run["given"]["seed"] != SEARCH_SEED]
    before = next(run["control"] for run in record.runs.values() if run["given"]["method"] is None)
    found = [{**each, "control_before": before} for each in compare(runs)]
    record.save(form=options.form, comparison=found)
    print(table(found))
    if options.output:
        draw(runs, options.output.with_suffix(".png"))
    return {"comparison": found}


def run_all(run: Any, size: dict[str, Any], methods: list[str], pool: ThreadPoolExecutor) -> None:
    """Measure the base, search rates, then teach: first every seed at the main size."""
    run(method=None, facts=0, seed=0, rate=0.0, epochs=0)
    rates = dict(zip(methods, pool.map(lambda name: search(run, size, name), methods), strict=True))
    places = [(size["main"], seed) for seed in range(size["seeds"])]
    places += [(facts, 0) for facts in size["facts"] if facts != size["main"]]

    def teach(method: str, facts: int, seed: int) -> None:
        run(method=method, facts=facts, seed=seed, rate=rates[method], epochs=size["epochs"])

    list(pool.map(lambda each: teach(*each), [(name, *place) for place in places for name in methods]))


def search(run: Any, size: dict[str, Any], method: str) -> float:
    """The rate with which most of other codes' meanings are known first."""
    rates = [rate for rate, _ in METHODS[method].settings]
    if not size["search"]:
        return rates[1]

    def worth(rate: float) -> tuple[float, float]:
        found = run(method=method, facts=min(size["facts"]), seed=SEARCH_SEED, rate=rate, epochs=size["search"])
        best = max(each["known"] for each in found["measures"])
        return best, -found["ends"][-1]

    return max(rates, key=worth)


def run_once(
    base: str, method: str | None, facts: int, seed: int, rate: float, epochs: int, block: int, control: int
) -> dict[str, Any]:
    """Teach codes, asking for them on the way, and at the end for others; `None` measures the base."""
    import torch
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    general = read_blocks("english", tokenizer, block, control, part="test")
    if method is None:
        return {"control": mean(row_losses(load(base), general))}
    codes = [line.split(" ", 1) for text in documents("icd10") for line in text.splitlines() if line[0] != "-"]
    drawn = random.Random(seed).sample(codes, 2 * facts)
    taught, others = drawn[:facts], drawn[facts:]
    rows = []
    for pair in taught:
        prompt, answer = encode(tokenizer, *pair, WAYS["line"])
        rows.append((prompt + answer, [-100] * len(prompt) + answer))
    torch.manual_seed(seed)
    prepared = prepare(method, base)
    measures: list[dict[str, float]] = [{"step": 0, "seconds": 0.0, "known": 0.0}]
    per_epoch = -(-len(rows) // BATCH)

    def measure(step: int) -> bool:
        measures.append({"step": step, "known": recall(prepared.model, tokenizer, taught, WAYS["line"])})
        return measures[-1]["known"] >= ENOUGH

    given = {"rate": rate, "batch": BATCH, "steps": epochs * per_epoch, "seed": seed, "decay": False}
    found = fit(prepared, rows, **given, every=per_epoch, measure=measure)
    for each in measures[1:]:
        each["seconds"] = found["ends"][each["step"] - 1]
    return {
        **found,
        "tokens": sum(len(ids) for ids, _ in rows),
        "measures": measures,
        "known": {way: recall(prepared.model, tokenizer, taught, form) for way, form in WAYS.items()},
        "others": recall(prepared.model, tokenizer, others, WAYS["line"]),
        "control": mean(row_losses(prepared.model, general)),
    }


def encode(tokenizer: Any, code: str, meaning: str, form: str) -> tuple[list[int], list[int]]:
    """Token ids of the prompt, and of the meaning to the end of its line."""
    parts = (form.format(code=code), f" {meaning}\n")
    prompt, answer = (tokenizer(part, add_special_tokens=False)["input_ids"] for part in parts)
    return prompt, answer


def recall(model: Any, tokenizer: Any, facts: list[list[str]], form: str) -> float:
    """Share of the facts whose meaning greedy decoding would write, to the end of the line.

    It would if each token of the meaning is the likeliest one after the prompt and the tokens before it.
    """
    import torch

    encoded = [encode(tokenizer, *pair, form) for pair in facts]
    encoded.sort(key=lambda pair: len(pair[0]) + len(pair[1]))
    training, right = model.training, 0
    model.eval()
    for part in (encoded[n : n + 16] for n in range(0, len(encoded), 16)):
        rows = [torch.tensor(prompt + answer) for prompt, answer in part]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)  # on the right, where no token looks
        with torch.no_grad():
            likeliest = model(input_ids=padded.to(model.device), use_cache=False).logits.argmax(-1).tolist()
        for (prompt, answer), each in zip(part, likeliest, strict=True):
            right += each[len(prompt) - 1 : len(prompt) + len(answer) - 1] == answer
    model.train(training)
    return right / len(facts)


def compare(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each run the seconds until shares of the facts are known, and until LoRA's best recall is reached."""
    references = {place(run): run for run in runs if run["given"]["method"] == REFERENCE}
    return [describe(run, references[place(run)]) for run in runs]


def place(run: dict[str, Any]) -> tuple[int, int]:
    """What a run shares with those that it is compared with."""
    return run["given"]["facts"], run["given"]["seed"]


def describe(run: dict[str, Any], reference: dict[str, Any]) -> dict[str, Any]:
    """The comparison of one run."""
    best = min(max(each["known"] for each in reference["measures"]), ENOUGH)  # some end their training there
    goals = {"best": best, **{f"{share:g}": share for share in SHARES}}
    return {
        **{name: run["given"][name] for name in ("method", "facts", "seed", "rate")},
        **{name: run[name] for name in ("tokens", "known", "others", "control")},
        "best_of_reference": best,
        "seconds_per_step": seconds_per_step(run["ends"], len(run["ends"]) // 2),
        "seconds": {name: time_to(run["measures"], share) for name, share in goals.items()},
        "seconds_of_reference": {name: time_to(reference["measures"], share) for name, share in goals.items()},
    }


def time_to(measures: list[dict[str, float]], share: float) -> float | None:
    """Processor seconds until that share is known, linear between measures."""
    for earlier, later in itertools.pairwise(measures):
        if later["known"] >= share:
            part = (share - earlier["known"]) / max(later["known"] - earlier["known"], 1e-12)
            return earlier["seconds"] + part * (later["seconds"] - earlier["seconds"])
    return None


def table(found: list[dict[str, Any]]) -> str:
    """The comparison as Markdown; of several seeds the median, with the smallest and the largest behind it."""
    shares = " | ".join(f"to {share:.0%}, s" for share in SHARES)
    lines = [
        f"Perplexity of the control before: {math.exp(found[0]['control_before']):.2f}",
        "",
        f"| facts | method | rate | s/step | {shares} | to LoRA's best, s | ÷ LoRA's | known at the end "
        "| … code means | … question | others | control |",
        "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for facts, method in dict.fromkeys((each["facts"], each["method"]) for each in found):
        mine = [each for each in found if (each["facts"], each["method"]) == (facts, method)]

        def middle(value: Any, form: str, mine: list[Any] = mine) -> str:
            values = sorted(math.inf if (each := value(run)) is None else each for run in mine)
            spread = f" ({values[0]:{form}}–{values[-1]:{form}})" if len(values) > 1 else ""
            return f"{statistics.median(values):{form}}{spread}".replace("inf", "not reached")

        def ratio(run: dict[str, Any]) -> float | None:
            seconds = run["seconds"]["best"]
            return seconds and seconds / run["seconds_of_reference"]["best"]

        cells = [str(facts), method, f"{mine[0]['rate']:g}", middle(lambda run: run["seconds_per_step"], ".2f")]
        for goal in (*(f"{share:g}" for share in SHARES), "best"):
            cells.append(middle(lambda run, goal=goal: run["seconds"][goal], ".0f"))
        cells.append(middle(ratio, ".2f"))
        cells += [middle(lambda run, way=way: run["known"][way], ".0%") for way in WAYS]
        cells += [middle(lambda run: run["others"], ".0%"), middle(lambda run: math.exp(run["control"]), ".2f")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Share of the facts known over seconds of training, a panel for each size of text."""
    from matplotlib.figure import Figure

    sizes = sorted({run["given"]["facts"] for run in runs})
    methods = list(dict.fromkeys(run["given"]["method"] for run in runs))
    figure = Figure(figsize=(4.2 * len(sizes) + 0.8, 4.4), layout="constrained")
    for panel, facts in zip(figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0], sizes, strict=True):
        for run in runs:
            given = run["given"]
            if given["facts"] == facts:
                points = [(each["seconds"], each["known"]) for each in run["measures"]]
                label = given["method"] if given["seed"] == 0 and facts == sizes[0] else None
                color = f"C{methods.index(given['method'])}"
                panel.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1, label=label)
        panel.set_xlabel("processor seconds of training")
        panel.set_title(f"{facts} codes", loc="left", fontsize="medium")
        panel.grid(alpha=0.25)
        panel.spines[["top", "right"]].set_visible(False)
    figure.axes[0].set_ylabel("share of the meanings known")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
