"""Two texts in one model: organs of each put together, against two LoRA adapters put together and each alone.

    python benchmarks/two_domains.py            # three methods, one seed: an hour (make bench-two-domains)
    python benchmarks/two_domains.py --quick    # fewer steps and rows: ten minutes
    python benchmarks/two_domains.py --smoke    # a small random model, for the test suite

Each method is trained on King James and, from the base again, on the medical codes. What it learned is saved, and both
are put into one model without further training, each with a weight of 1 and of 0.5. Adapters: PEFT's
`add_weighted_adapter` with "cat", which adds up what they change. Organs of the same layers: `average_donors` with
"task_arithmetic", which does the same. Organs of different layers, the lower half and the upper half: both are active.
Measured: the loss on 8,192 held-out tokens of both texts and of a general one. Learning rates are the middle
ones of those that `train.py` tries. What is in the output file is not run again.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from methods import METHODS, REFERENCE, fit, mean, prepare, row_losses
from record import is_one_run, opened, parser_of
from texts import read_blocks
from train import CONTROL

DOMAINS = ("kjv", "icd10")
WAYS = {  # what is trained on each text
    "LoRA, r = 16": (REFERENCE, REFERENCE),
    "organs of the same layers": ("organ, outputs",) * 2,
    "organs of different layers": ("organ, outputs of the lower half", "organ, outputs of the upper half"),
}
WEIGHTS = (1.0, 0.5)
FORMS: dict[str, dict[str, Any]] = {
    "full": {"steps": 32, "block": 128, "held": 64},
    "quick": {"steps": 8, "block": 128, "held": 8},
    "smoke": {"steps": 2, "block": 32, "held": 2},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, put together, print the table, write the numbers."""
    options = parser_of("What was learned from two texts, in one model.", FORMS).parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    with opened(__file__, options, run_once) as (record, pool):
        runs = list(pool.map(lambda way: record(way=way, seed=0, **FORMS[options.form]), WAYS))
    record.save(form=options.form)
    print(table(runs))
    return {"runs": runs}


def run_once(base: str, way: str, seed: int, steps: int, block: int, held: int) -> dict[str, Any]:
    """Train on each text, then measure each alone and both together."""
    import torch
    from transformers import AutoTokenizer

    read = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    texts = {name: read(name, most=held, part="test") for name in (*DOMAINS, CONTROL)}

    def losses(model: Any) -> dict[str, float]:
        return {name: mean(row_losses(model, rows)) for name, rows in texts.items()}

    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folders = []
        for domain, method in zip(DOMAINS, WAYS[way], strict=True):
            torch.manual_seed(seed)
            prepared = prepare(method, base)
            found.setdefault("base", losses(prepared.model))  # before training, all are the base
            settings = METHODS[method].settings
            rate, batch = settings[len(settings) // 2]
            rows = [(row, row) for row in read(domain, most=steps * 4, part="train", seed=seed).tolist()]
            fit(prepared, rows, rate=rate, batch=batch, steps=steps * 4 // batch, seed=seed)
            found[f"{domain} alone"] = losses(prepared.model)
            folders.append(Path(scratch, domain))
            prepared.model.save_pretrained(folders[-1])
            del prepared
        for weight in WEIGHTS:
            found[f"both, {weight:g}"] = losses(together(way, base, folders, weight))
    return {"losses": found}


def together(way: str, base: str, folders: list[Path], weight: float) -> Any:
    """A model with both, each with that weight."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM, average_donors

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    if WAYS[way][0] == REFERENCE:
        model = PeftModel.from_pretrained(model, folders[0], adapter_name=DOMAINS[0])
        model.load_adapter(folders[1], adapter_name=DOMAINS[1])
        model.add_weighted_adapter(list(DOMAINS), [weight, weight], "both", combination_type="cat")
        model.set_adapter("both")
        return model
    if WAYS[way][0] == WAYS[way][1]:
        donor = average_donors(folders, [weight, weight], "task_arithmetic", base=model)
        return TransplantedForCausalLM.from_pretrained(model, donor)
    model = TransplantedForCausalLM.from_pretrained(model, folders[0], donor_name=DOMAINS[0])
    model.load_donor(folders[1], DOMAINS[1])
    for name in DOMAINS:
        model.set_donor_scale(name, weight)
    return model


def table(runs: list[dict[str, Any]]) -> str:
    """Perplexities as Markdown."""
    names = (*DOMAINS, CONTROL)
    lines = [f"| | {' | '.join(names)} |", f"| --- |{' ---: |' * len(names)}"]
    rows = {"base": runs[0]["losses"]["base"]}
    for run in runs:
        rows |= {f"{run['given']['way']}: {what}": each for what, each in run["losses"].items() if what != "base"}
    for what, losses in rows.items():
        lines.append(f"| {what} | {' | '.join(f'{math.exp(losses[name]):.2f}' for name in names)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
