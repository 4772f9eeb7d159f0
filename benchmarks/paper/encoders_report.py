"""What the runs of `encoders.py` say: gains and their share of LoRA's, a table, the verdict, the picture."""

from __future__ import annotations

import statistics
from pathlib import Path

from encoder_models import DECODER, MINILM
from pictures import finish, panels_of
from question import Runs, markdown, spread

ORGANS, LORA = ("organ, replace", "organ, insert"), "LoRA, r = 16"
LEAST = 0.01  # nats per token: of a smaller gain of LoRA no share is taken
COMPARED = (*ORGANS, LORA, "full")


def find(runs: Runs) -> Runs:
    """For each run that was tested: its losses, and what it gained of the domain and lost of the control, in nats.

    Models that were not yet tested with every method are left out.
    """
    tested = [run for run in runs if run["given"]["part"] == "test"]
    before = {run["given"]["base"]: run for run in tested if run["given"]["method"] is None}
    tried = {(run["given"]["base"], run["given"]["method"]) for run in tested}
    found = []
    for run in tested:
        if not tried >= {(run["given"]["base"], method) for method in COMPARED}:
            continue
        start = before[run["given"]["base"]]
        given = {name: run["given"][name] for name in ("base", "method", "seed", "rate")}
        gain, lost = start["domain"] - run["domain"], run["control"] - start["control"]
        found.append({**given, "domain": run["domain"], "gain": gain, "lost": lost, "trained": run.get("trained", 0)})
    return found


def headline(found: Runs) -> str:
    """Whether organs have a smaller share of LoRA's gain in encoders than in a decoder."""
    shares, idle = {}, []
    for base in dict.fromkeys(each["base"] for each in found):
        gains = {method: statistics.median(gains_of(found, base, method)) for method in (*ORGANS, LORA)}
        if gains[LORA] > LEAST:
            shares |= {(base, organ): gains[organ] / gains[LORA] for organ in ORGANS}
        else:
            idle.append(base)
    pairs = [(base, organ) for base, organ in shares if base != DECODER and (DECODER, organ) in shares]
    lower = sum(shares[pair] < shares[DECODER, pair[1]] for pair in pairs)
    verdict = (
        "Organs work less well in encoders here, too"
        if pairs and lower == len(pairs)
        else "The paper's remark holds for some of them"
        if lower
        else "The paper's remark does not hold here"
    )
    text = ", ".join(f"{base} {share:.0%} ({organ.split()[-1]})" for (base, organ), share in shares.items())
    return (
        f"**{verdict}.** Share of LoRA's gain that an organ has: {text}; smaller in the encoder than in the decoder "
        f"({DECODER}) in {lower} of {len(pairs)} comparisons."
        + (f" In {', '.join(idle)}, LoRA in the layers gains less than {LEAST:g} nats." if idle else "")
        + (
            f" Only {MINILM} (all-MiniLM-L6-v2, under a new head) is a pretrained encoder."
            if MINILM in (base for base, _ in shares)
            else " No pretrained encoder is among them."
        )
    )


def gains_of(found: Runs, base: str, method: str | None) -> list[float]:
    """What a method gains on a model, of all seeds."""
    return [each["gain"] for each in found if (each["base"], each["method"]) == (base, method)]


def details(found: Runs) -> str:
    """Gains and losses as a table."""
    heads = ["model, method", "trained", "rate", "domain, nats", "gain", "lost of the control"]
    rows = []
    for base in dict.fromkeys(each["base"] for each in found):
        for method in (None, *COMPARED):
            mine = [each for each in found if (each["base"], each["method"]) == (base, method)]
            figures = (spread([each[name] for each in mine], 3) for name in ("domain", "gain", "lost"))
            rows.append([f"{base}: {method or 'before'}", f"{mine[0]['trained']:,}", f"{mine[0]['rate']:g}", *figures])
    return markdown(heads, rows)


def draw(found: Runs, path: Path) -> None:
    """Gain on the domain by model and method, with the range over the seeds."""
    bases = list(dict.fromkeys(each["base"] for each in found))
    figure, ((panel,),) = panels_of(1, 1, width=8)
    for n, method in enumerate(COMPARED):
        for place, base in enumerate(bases):
            gains = gains_of(found, base, method)
            middle, x = statistics.median(gains), place + 0.2 * (n - 1.5)
            panel.bar(x, middle, 0.18, color=f"C{n}", label=method)
            panel.vlines(x, min(gains), max(gains), color="black")
    panel.set_xticks(range(len(bases)), bases)
    panel.set_ylabel("gain on held-out King James,\nnats per predicted token")
    panel.set_title(f"What the same steps gain in encoders, and in a decoder ({DECODER})", loc="left")
    finish(figure, path)
