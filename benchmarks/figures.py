"""Tables of the results files, as Markdown."""

from __future__ import annotations

import json
import math
import statistics
from typing import Any

import privacy
import recall
import report
import sweep
from methods import REFERENCE, SEARCH_SEED, mean, seconds_per_step
from record import key_of
from texts import ROOT

RESULTS = ROOT / "benchmarks" / "results"
NAMES = {"kjv": "King James", "icd10": "medical codes", "french": "French"}
OUTPUTS, CACHED, CONFINED = "organ, outputs", "organ, upper half, cache", recall.CONFINED


def read(name: str) -> dict[str, Any]:
    """A results file."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def train(form: str = "") -> str:
    """What learning from fresh text gave, with all columns; `form` is another one of the script's."""
    found = read(f"train-{form}" if form else "train")
    script = f"train.py --{form}" if form else "train.py"
    return f"{report.tables(found['comparison'])}\n{source(script, found)}"


def gpu() -> str:
    """What a step costs on a GPU, what the search for rates there gave, and the runs at equal time."""
    found = read("train-gpu")
    base = found["comparison"][0]["base"]
    ends = {each["method"]: each for each in found["comparison"]}
    heads = ("method", "ms per step", "memory, GB", "with checkpointing", "best rate", "perplexity after the search")
    heads += ("steps", "tokens, millions", "perplexity at equal time", "of general text")
    lines = [f"| {' | '.join(heads)} |", f"| --- |{' ---: |' * (len(heads) - 1)}"]
    for method, each in on_gpu().items():
        costs = (f"{1000 * each['seconds']:.0f}", *(f"{each[key] / 1e9:.1f}" for key in ("peak", "peak_saving")))
        rate = f"{each['rate']:g}{', the end of its grid' if each['at_end'] else ''}"
        end = ("–",) * 4
        if run := ends.get(method):
            losses = run["losses"][f"{run['scale']:g}"]
            tokens = run["steps"] * run["batch"] * found["runs"][0]["given"]["block"] / 1e6
            end = (
                f"{run['steps']}",
                f"{tokens:.1f}",
                *(f"{math.exp(losses[of]):.2f}" for of in ("domain", "control")),
            )
        cells = (method, *costs, rate, f"{math.exp(each['loss']):.2f}", *end)
        lines.append(f"| {' | '.join(cells)} |")
    before = f"Before, at the end: {math.exp(base['domain']):.2f}, general text {math.exp(base['control']):.2f}. "
    return "\n".join([*lines, "", before + source("train.py --gpu", found)])


def on_gpu() -> dict[str, dict[str, Any]]:
    """Of each method: seconds of a step, peak bytes, the best rate and the loss with it (nats per token)."""
    runs = [run for run in read("train-gpu")["runs"] if run["given"]["method"]]
    found = {}
    for method in dict.fromkeys(run["given"]["method"] for run in runs):
        mine = [run for run in runs if run["given"]["method"] == method]
        saving, plain = sorted((run for run in mine if not run["given"]["held"]), key=lambda run: len(run["ends"]))
        searched = [run for run in mine if run["given"].get("seed") == SEARCH_SEED]
        losses = {run["given"]["rate"]: min(losses_aside(run)) for run in searched}
        rate = min(losses, key=losses.__getitem__)
        found[method] = {
            "seconds": seconds_per_step(plain["ends"], 2),
            "peak": plain["peak"],
            "peak_saving": saving["peak"],
            "rate": rate,
            "at_end": rate in (min(losses), max(losses)),
            "loss": losses[rate],
        }
    return found


def losses_aside(run: dict[str, Any]) -> list[float]:
    """The loss on text set aside at each scale, in nats per token."""
    return [mean(each["domain"]) for each in run["held"]["choose"].values()]


def recall_table() -> str:
    """What learning by heart gave."""
    found = read("recall")
    return f"{recall.table(found['comparison'])}\n\n{source('recall.py', found)}"


def privacy_table() -> str:
    """What the attacks on trained rows found."""
    found = read("privacy")
    runs, size = {key_of(run["given"]): run for run in found["runs"]}, privacy.FORMS[found["form"]]
    seeds = [
        privacy.of_seed(lambda **given: runs[key_of(given)], size, privacy.COMPARED, seed)
        for seed in range(found["seeds"])
    ]
    return f"{privacy.tables(seeds)}\n\n{source('privacy.py', found)}"


def sweep_table() -> str:
    """What a sweep over positions saves."""
    found = read("sweep")
    return f"{sweep.table(found)}\n\n{source('sweep.py', {**found, 'runs': [found]})}"


def source(script: str, found: dict[str, Any]) -> str:
    """Where numbers come from."""
    commits = ", ".join(f"`{each[:7]}`" for each in dict.fromkeys(run["commit"] for run in found["runs"]))
    made_on = [run.get("hardware", found["hardware"]) for run in found["runs"]]
    versions = [run.get("versions", found["versions"]) for run in found["runs"]]
    hardware = " and ".join(dict.fromkeys(each.get("gpu", each["processor"]) for each in made_on))
    packages = ", ".join(
        f"{name} {' and '.join(dict.fromkeys(each[name.lower()] for each in versions))}"
        for name in ("Python", "torch", "transformers")
    )
    threads = "" if all("gpu" in each for each in made_on) else ", one thread a run"
    return f"`{script}`, commit {commits}; {hardware}{threads}; {packages}."


def middle(values: list[float], form: str = ".2f") -> str:
    """The median, with the smallest and the largest behind it if there are several."""
    values = sorted(values)
    spread = f" ({values[0]:{form}} – {values[-1]:{form}})" if len(values) > 1 else ""
    return f"{statistics.median(values):{form}}{spread}"


def lora() -> str:
    """Organs and LoRA side by side, for the README."""
    return side_by_side(fresh_rows() + recall_rows() + switch_rows())


def side_by_side(rows: list[tuple[str, ...]]) -> str:
    """Rows as Markdown."""
    lines = ["| | organ | LoRA, r = 16 | script |", "| --- | ---: | ---: | --- |"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def fresh_rows() -> list[tuple[str, ...]]:
    """Fresh text: perplexity of the domain, and of general text where both have the same one of the domain."""
    runs = read("train")["comparison"]
    sides = [[each for each in runs if each["method"] == method] for method in (OUTPUTS, REFERENCE)]
    rows = []
    for domain, name in NAMES.items():
        here = [[each for each in side if each["domain"] == domain] for side in sides]
        before = {key: math.exp(value) for key, value in here[0][0]["base"].items()}
        domains = ([math.exp(each["losses"][f"{each['scale']:g}"]["domain"]) for each in side] for side in here)
        controls = ([math.exp(each["equal"][key]) for each in here[0]] for key in ("control", "control_of_reference"))
        rows += [
            (f"fresh text, {name}: perplexity; {before['domain']:.2f} before", *map(middle, domains), "`train.py`"),
            (
                f"… of general text at equal perplexity; {before['control']:.2f} before",
                *map(middle, controls),
                "`train.py`",
            ),
        ]
    for what, key in (
        ("peak memory of training with gradient checkpointing", "peak_bytes_saving"),
        ("file", "file_bytes"),
    ):
        rows.append((f"… {what}, MB", *(f"{side[0][key] / 1e6:,.0f}" for side in sides), "`train.py`"))
    return rows


def recall_rows() -> list[tuple[str, ...]]:
    """Facts by heart: time to LoRA's recall, and the perplexity of general text then."""
    runs, rows = read("recall")["comparison"], []
    before = math.exp(runs[0]["control_before"])
    for facts in sorted({each["facts"] for each in runs}):
        here = [
            [each for each in runs if (each["facts"], each["method"]) == (facts, method)]
            for method in (CACHED, REFERENCE)
        ]
        seconds = (middle([each["seconds"]["best"] or math.inf for each in side], ".0f") for side in here)
        general = (middle([math.exp(each["control"]) for each in side], ".1f") for side in here)
        rows += [
            (f"{facts} facts by heart, seconds of training", *seconds, "`recall.py`"),
            (f"… perplexity of general text afterwards; {before:.1f} before", *general, "`recall.py`"),
        ]
    return rows


def switch_rows() -> list[tuple[str, ...]]:
    """Switching on a prompt that was read before, and in a model without one."""
    prompt, switch = read("prefill"), read("runtime")["switch"]
    rows = [
        (
            f"another organ on a prompt of {prompt['num_tokens']:,} tokens, from layer {case['entry']} of "
            f"{prompt['num_layers']}: s to first token",
            f"{case['shared_seconds']:.2f}",
            f"{prompt['lora_seconds']:.2f}",
            "`prefill.py`",
        )
        for case in prompt["cases"]
    ]
    pairs = {"switch to another one": ("set_donor", "set_adapter"), "load one more": ("load_donor", "load_adapter")}
    for what, names in pairs.items():
        cells = (f"{switch['seconds'][name] * 1000:.1f}" for name in names)
        rows.append((f"{what}, {switch['num_layers']} layers of random weights: ms", *cells, "`runtime.py`"))
    return rows


def native() -> str:
    """An organ beside a native model of equal depth, and what cutting one reads, for the README."""
    runtime, extract = read("runtime"), read("extract")
    ratios = [
        value for each in runtime["load"].values() for key, value in each.items() if key.startswith("per_native")
    ]
    cut = extract["ways"]["range"]
    rows = [
        (
            "decoding speed ÷ that of a native model of equal depth",
            f"{runtime['decode']['ratio']:.2f}",
            "`runtime.py`",
        ),
        ("load and first forward pass ÷ its time", f"{min(ratios):.2f} – {max(ratios):.2f}", "`runtime.py`"),
        (
            f"MB read from a repo of {extract['model_bytes'] / 1e6:,.0f} MB (random weights) to cut an organ of "
            f"{cut['organ_bytes'] / 1e6:,.0f} MB",
            f"{cut['bytes_served'] / 1e6:,.0f}",
            "`extract.py`",
        ),
    ]
    return "\n".join(["| | | script |", "| --- | ---: | --- |", *(f"| {' | '.join(row)} |" for row in rows)])


def demo() -> str:
    """What the demo printed, for the page about installing."""
    found = read("demo")
    rows = [
        (
            f"perplexity, {what}",
            *(f"{value[key]:.2f}" for key in ("before", "after")),
            f"{value['change_percent']:+.1f} %",
        )
        for what, value in (
            ("King James text held out", found["perplexity"]["domain"]),
            ("Python source (control)", found["perplexity"]["control"]),
        )
    ]
    weights, size = found["parameters"], found["bytes"]
    rows += [
        (
            "parameters",
            f"{weights['model'] / 1e6:.1f} M",
            f"{weights['organ'] / 1e6:.1f} M",
            f"{100 * weights['organ'] / weights['model']:.0f} %",
        ),
        (
            "file",
            f"{size['merged'] / 1e6:.1f} MB",
            f"{size['organ'] / 1e6:.1f} MB",
            f"{100 * size['organ'] / size['merged']:.0f} %",
        ),
    ]
    return "\n".join(
        [
            "| | base | with the organ / the organ | |",
            "| --- | ---: | ---: | ---: |",
            *(f"| {' | '.join(row)} |" for row in rows),
        ]
    )
