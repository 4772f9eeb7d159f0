"""What the results say, a sentence or two for each question, computed from the files."""

from __future__ import annotations

import math
import statistics
import textwrap
from collections.abc import Callable
from typing import Any

import figures
from figures import CACHED, CONFINED, NAMES, OUTPUTS, RESULTS, middle, read, source
from methods import REFERENCE


def fresh() -> str:
    """Fresh text: the organ of outputs against LoRA."""
    domains, controls = changes("train")
    worst = max(map(statistics.median, domains.values()))
    verdict = "Yes" if worst <= 0 else "Within a per cent" if worst <= 0.01 else "Not quite" if worst <= 0.05 else "No"
    return paragraph(
        f"**{verdict}:** against LoRA's of the same seed, the organ's perplexity is {listed(domains)}. "
        f"That of general text, with both at equal perplexity of the domain, is {listed(controls)}."
    )


def other_forms() -> str:
    """The same with general text mixed in, and with ten times the tokens."""
    mixed, longer = (changes(f"train-{form}") for form in ("replay", "long"))
    return paragraph(
        f"With general text in every fourth row: {listed(mixed[0])}; general text: {listed(mixed[1])}. "
        f"With ten times the tokens: {listed(longer[0])}; general text: {listed(longer[1])}. One seed each."
    )


def changes(name: str) -> tuple[dict[str, list[float]], dict[str, list[float]]]:
    """By how much the organ's perplexity differs from LoRA's, of the domain and of general text; by text and seed."""
    runs = read(name)["comparison"]

    def change(domain: str, ratio: Callable[[dict[str, Any], dict[str, Any]], float]) -> list[float]:
        here = {(each["method"], each["seed"]): each for each in runs if each["domain"] == domain}
        seeds = sorted(seed for method, seed in here if method == OUTPUTS)
        return [ratio(here[OUTPUTS, seed], here[REFERENCE, seed]) - 1 for seed in seeds]

    def of_domain(organ: dict[str, Any], lora: dict[str, Any]) -> float:
        ends = (each["losses"][f"{each['scale']:g}"]["domain"] for each in (organ, lora))
        return math.exp(next(ends) - next(ends))

    def of_control(organ: dict[str, Any], _: dict[str, Any]) -> float:
        return math.exp(organ["equal"]["control"] - organ["equal"]["control_of_reference"])

    measured = {domain: text for domain, text in NAMES.items() if any(each["domain"] == domain for each in runs)}
    domains, controls = (
        {text: change(domain, ratio) for domain, text in measured.items()} for ratio in (of_domain, of_control)
    )
    return domains, controls


def on_gpu() -> str:
    """The same on a GPU, on source code."""
    organ, lora = (figures.on_gpu()[method] for method in (OUTPUTS, REFERENCE))
    shares = {key: organ[key] / lora[key] for key in ("seconds", "peak", "peak_saving")}
    found = {each["method"]: each for each in read("train-gpu")["comparison"]}
    ends = {method: each["losses"][f"{each['scale']:g}"] for method, each in found.items()}
    base, wide = found[OUTPUTS]["base"], "LoRA, r = 256"

    def listed_of(text: str) -> str:
        values = (f"{math.exp(ends[method][text]):.2f}" for method in (OUTPUTS, REFERENCE, wide))
        return "{} with the organ, {} with LoRA and {} with LoRA of rank 256".format(*values)

    return paragraph(
        f"On an H100, in bfloat16 and with larger batches, a step of the organ takes {shares['seconds']:.2f} of the "
        f"time of LoRA's and {shares['peak']:.2f} of its memory ({shares['peak_saving']:.2f} with gradient "
        "checkpointing); LoRA is trained by transformers' Trainer, with the logits of all tokens in memory at once. "
        f"At equal time, with millions of tokens of source code, the perplexity of code is {listed_of('domain')}; "
        f"{math.exp(base['domain']):.2f} before. That of general text is {listed_of('control')}; "
        f"{math.exp(base['control']):.2f} before. Row for row, the loss is {-found[OUTPUTS]['fresh']['mean']:.2f} "
        f"nats per token below LoRA's with the organ, and {-found[wide]['fresh']['mean']:.2f} with LoRA of rank 256: "
        "what puts the organ ahead of that one is that its steps are shorter. One seed."
    )


def paragraph(text: str) -> str:
    """The lines of a text, none of which ends within an equation or before a percent sign."""
    text = text.replace(" = ", "\u00a0=\u00a0").replace(" %", "\u00a0%")
    return "\n".join(textwrap.wrap(text, 118, break_long_words=False, break_on_hyphens=False))


def listed(changes: dict[str, list[float]]) -> str:
    """The median of changes, with the smallest and the largest behind it if there are several, and their names."""

    def said(name: str, values: list[float]) -> str:
        low, middle, high = (f"{value:+.1%}" for value in (min(values), statistics.median(values), max(values)))
        return f"{name} {middle}" + (f" ({low.removesuffix('%')} to {high})" if len(values) > 1 else "")

    return ", ".join(said(*each) for each in changes.items()).replace("-", "−").replace("%", " %")


def recall() -> str:
    """Facts by heart: an organ with the prefix cache against LoRA."""
    runs, parts, confined, sooner, spared = read("recall")["comparison"], [], [], [], []
    for facts in sorted({each["facts"] for each in runs}):
        here = {(each["method"], each["seed"]): each for each in runs if each["facts"] == facts}
        seeds = sorted(seed for method, seed in here if method == CACHED)
        ratios = [share_of_reference(here[CACHED, seed]) for seed in seeds]
        controls = [[math.exp(here[method, seed]["control"]) for seed in seeds] for method in (CACHED, REFERENCE)]
        sooner.append(statistics.median(ratios) < 1)
        spared.append(statistics.median(controls[0]) < statistics.median(controls[1]))
        ratio = statistics.median(share_of_reference(here[CONFINED, seed]) for seed in seeds)
        control = statistics.median(math.exp(here[CONFINED, seed]["control"]) for seed in seeds)
        confined.append(f"{ratio:.2f} of the time to LoRA's best, general text at {control:.0f}, for {facts} facts")
        parts.append(
            f"{facts} facts: {middle(ratios)} of the time to LoRA's best, general text at "
            f"{statistics.median(controls[0]):.0f} instead of {statistics.median(controls[1]):.0f}"
        )
    verdict = "Yes" if all(sooner) else "Not always" if any(sooner) else "No"
    less = "less" if all(spared) else "not always less" if any(spared) else "not less"
    before = math.exp(runs[0]["control_before"])
    return paragraph(
        f"**{verdict}, and it forgets {less}** (general text before: {before:.0f}). {'; '.join(parts)}. LoRA in "
        f"the same layers, with the same cache: {'; '.join(confined)}."
    )


def share_of_reference(run: dict[str, Any]) -> float:
    """Time to the best recall of LoRA as a share of LoRA's; infinite if it was not reached."""
    return (run["seconds"]["best"] or math.inf) / run["seconds_of_reference"]["best"]


def switching() -> str:
    """The first token after another organ was chosen."""
    found = read("prefill")
    shares = [
        f"{case['shared_seconds'] / found['lora_seconds']:.2f} of LoRA's time (organs from layer {case['entry']} of "
        f"{found['num_layers']})"
        for case in found["cases"]
    ]
    quicker = all(case["shared_seconds"] < found["lora_seconds"] for case in found["cases"])
    verdict = "Sooner than another adapter" if quicker else "Not always sooner than another adapter"
    return paragraph(f"**{verdict}**: on a prompt of {found['num_tokens']:,} tokens in {' and '.join(shares)}.")


def native() -> str:
    """Against a native model of equal depth."""
    found = read("runtime")
    speed, targets = found["decode"]["ratio"], found["targets"]
    verdict = "Next to nothing in decoding" if speed > 0.95 else "Speed"
    return paragraph(
        f"**{verdict}:** it decodes at {speed:.2f} times the speed of a native model of equal depth. "
        f"{sum(each['holds'] for each in targets)} of {len(targets)} targets hold; [which](results/runtime.md)."
    )


def demo_run() -> str:
    """What the demo trained, and what it took."""
    found = read("demo")
    training, (begin, end), seconds = found["training"], found["layers"], found["seconds"]
    return paragraph(
        f"Layers {begin} – {end - 1} were trained in place on {training['tokens']:,} tokens in {training['steps']} "
        f"steps. The run took {seconds['total']:.0f} s, of which {seconds['Train']:.0f} s were training, and at most "
        f"{found['peak_memory_gb']:.1f} GB of memory in one process."
    )


def of_paper(question: str) -> str:
    """What a script of `paper/` has answered, with its picture."""
    if not (RESULTS / "paper" / f"{question}.json").exists():
        return "Only the small form in the test suite has been run."
    answer, name = read(f"paper/{question}")["answer"], question.replace("_", " ")
    return f"{paragraph(answer)}\n\n![{name}](results/paper/{question}.png)\n\n[Tables](results/paper/{question}.md)"


def details_of_paper(question: str) -> str:
    """Its tables and what belongs to them."""
    found = read(f"paper/{question}")
    return f"{found['details'].strip()}\n\n{source(f'paper/{question}.py', found)}"
