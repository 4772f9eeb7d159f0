"""The paper's second question: does an organ work outside the model that it was trained in?

    python benchmarks/paper/transfer.py              # SmolLM2, an hour of one core; --base gemma: hours
    python benchmarks/paper/transfer.py --quick      # one rate, fewer rows and steps
    python benchmarks/paper/transfer.py --smoke      # a small random model, for the test suite
    python benchmarks/paper/transfer.py --report     # answer and picture of the runs so far

The paper (arXiv 2601.13580) calls a trained organ a checkpoint that can be passed on and put into other models with
layers of that shape. Here two organs (the output projections of all layers; layers inserted a third of the way up) and
LoRA are trained on King James, each at the learning rate that was best on text set aside. Each is saved, reloaded into
the base, where it must give the same logits bit for bit, and moved into

- the base after it was trained further on general text, by full fine-tuning, after several numbers of steps;
- another fine-tune of the base, on the medical codes.

An organ in place of a recipient's tensors overwrites what the recipient learned in them. So it is also put in as the
recipient's tensors plus what training changed in the base's (`average_donors` with "task_arithmetic"), as LoRA is.

Gain: by how much the loss on held-out King James falls when it is put in. Distance of a recipient: the norm of the
difference of all its weights from the base's, relative to the base's; and KL(base || recipient) on general text.
"""

from __future__ import annotations

import functools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from bases import RATES, middle_rate, rates_of

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, REFERENCE, SEARCH_SEED, fit, load, mean, prepare, row_losses  # noqa: E402 (from the folder above)
from question import ask, parser_of, size_of  # noqa: E402
from texts import read_blocks  # noqa: E402
from transfer_report import ORIGIN, details, draw, find, headline  # noqa: E402

DOMAIN, CONTROL = "kjv", "english"
WAYS = {  # how it is put in: what was trained
    "organ, outputs": "organ, outputs",
    "organ, outputs, its change added": "organ, outputs",
    "organ, inserted": "organ, inserted",
    REFERENCE: REFERENCE,
}
FULL: dict[str, Any] = {
    **{"block": 128, "batch": 2, "steps": 32, "search": 16, "choose": 16, "held": 64, "control": 16, "seeds": 2},
    "recipients": {CONTROL: [8, 32, 96], "icd10": [32]},  # text, and the steps after which it is a recipient
    "recipient_rate": 2e-4,
}
SMALL = {**FULL, "search": 0, "seeds": 1, "held": 4, "control": 2}
FORMS: dict[str, dict[str, Any]] = {
    "full": FULL,
    "quick": {**SMALL, "steps": 2, "held": 2, "recipients": {CONTROL: [2, 4]}},
    "smoke": {**SMALL, "block": 32, "steps": 2, "recipients": {CONTROL: [1, 3], "icd10": [2]}},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Search rates, train organs and recipients, move, answer."""
    parser = parser_of(__file__, "What an organ does in other models.", FORMS)
    return ask(parser, arguments, run_once, run_all, (find, headline, details, draw))


def run_all(record: Any, options: Any, pool: Any) -> None:
    """The search for rates, then a run for each seed."""
    size = size_of(options, FORMS)
    run = functools.partial(record, block=size["block"], batch=size["batch"])

    def loss(pair: tuple[str, float]) -> float:
        given = {"steps": size["search"], "held": size["choose"], "seed": SEARCH_SEED, "part": "choose"}
        return run(rates=dict([pair]), **given)["loss"]

    methods = list(dict.fromkeys(WAYS.values()))
    rates = {method: middle_rate(options.base, method) for method in methods}
    if size["search"]:
        pairs = [(method, rate) for method in methods for rate in rates_of(options.base, method)]
        losses = dict(zip(pairs, pool.map(loss, pairs), strict=True))
        rates = {name: min((pair for pair in pairs if pair[0] == name), key=losses.__getitem__)[1] for name in methods}
    given = {name: size[name] for name in ("steps", "held", "control", "recipients", "recipient_rate")}
    if options.base in RATES:
        given["recipient_rate"] = middle_rate(options.base, "full")
    list(pool.map(lambda seed: run(rates=rates, **given, seed=seed, part="test"), range(size["seeds"])))


def run_once(
    base: str, rates: dict[str, float], block: int, batch: int, steps: int, held: int, seed: int, part: str,
    control: int = 0, recipients: dict[str, list[int]] | None = None, recipient_rate: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Train each method at its rate; without recipients, only measure it where it was trained.

    Args:
        rates: Of each method.
        held: Rows of King James that are measured, of that `part`.
        control: Rows of general text that the distance is measured on.
        recipients: Texts that the base is trained further on, and the steps after which it is measured.
        recipient_rate: The learning rate of that.
    """
    from transformers import AutoTokenizer

    read = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    rows = read(DOMAIN, most=held, part=part)
    learned = [(row, row) for row in read(DOMAIN, most=steps * batch, part="train", seed=seed).tolist()]
    given = {"batch": batch, "seed": seed}
    with tempfile.TemporaryDirectory() as scratch:
        identical, folders = {}, {}
        for method, rate in rates.items():
            prepared = prepare(method, base)
            fit(prepared, learned, rate=rate, steps=steps, **given)
            if recipients is None:
                return {"loss": mean(row_losses(prepared.model, rows))}
            folders[method] = Path(scratch, method)
            prepared.model.save_pretrained(folders[method])
            identical[method] = same_logits(prepared.model, put_in(method, base, base, folders), rows[:2])
            del prepared
        moved = [{"recipient": ORIGIN, "steps": 0, **moved_into(base, base, folders, rows)}]
        general = read(CONTROL, most=control, part="test")
        for text, ends in (recipients or {}).items():
            taught = read(text, most=max(ends) * batch, part="train", seed=seed).tolist()
            trained = train_further(base, [(row, row) for row in taught], ends, Path(scratch), recipient_rate, given)
            for number, folder in trained.items():
                about = {"recipient": text, "steps": number, **distance(base, str(folder), general)}
                moved.append({**about, **moved_into(base, str(folder), folders, rows)})
    return {"identical": identical, "moved": moved}


def same_logits(one: Any, other: Any, rows: Any) -> bool:
    """Whether two models give the same logits, bit for bit."""
    import torch

    with torch.no_grad():
        logits = [model.eval()(input_ids=rows.to(model.device), use_cache=False).logits for model in (one, other)]
    return torch.equal(*logits)


def moved_into(base: str, recipient: str, folders: dict[str, Path], rows: Any) -> dict[str, Any]:
    """The loss of a recipient, and with what was trained in the base put in each way."""
    alone = mean(row_losses(load(recipient), rows))
    return {
        "alone": alone,
        "with": {way: mean(row_losses(put_in(way, base, recipient, folders), rows)) for way in WAYS},
    }


def put_in(way: str, base: str, recipient: str, folders: dict[str, Path]) -> Any:
    """The recipient with what was trained in the base."""
    from peft import PeftModel

    from not_hf import DonorModel, TransplantedForCausalLM, average_donors

    model, donor = load(recipient), folders[WAYS[way]]
    if way == REFERENCE:
        return PeftModel.from_pretrained(model, donor)
    if way != WAYS[way]:
        span = (0, model.config.num_hidden_layers)
        own = DonorModel.from_base(model, span, mode="replace", modules=METHODS[WAYS[way]].modules)
        donor = average_donors([donor, own], combination_type="task_arithmetic", base=base)
    return TransplantedForCausalLM.from_pretrained(model, donor)


def train_further(
    base: str, rows: list[Any], ends: list[int], scratch: Path, rate: float, given: dict[str, Any]
) -> dict[int, Path]:
    """Train all weights of the base at a constant rate; its folder after each of some numbers of steps."""
    prepared, folders = prepare("full", base), {}

    def keep(step: int) -> bool:
        if step in ends:
            folders[step] = Path(tempfile.mkdtemp(dir=scratch))
            prepared.model.save_pretrained(folders[step])
        return False

    fit(prepared, rows, rate=rate, steps=max(ends), **given, decay=False, every=1, measure=keep)
    return folders


def distance(base: str, recipient: str, rows: Any) -> dict[str, float]:
    """How far a recipient is from the base: of the weights, relative, and of what they predict (nats per token)."""
    import torch
    from torch.nn.functional import kl_div

    one, other = load(base).eval(), load(recipient).eval()
    with torch.no_grad():
        pairs = list(zip(one.parameters(), other.parameters(), strict=True))
        moved = math.fsum(float((b - a).square().sum()) for a, b in pairs)
        size = math.fsum(float(a.square().sum()) for a, _ in pairs)
        found = []
        for part in rows.to(one.device).split(2):
            first, second = (model(input_ids=part, use_cache=False).logits.log_softmax(-1) for model in (one, other))
            found.append(float(kl_div(second, first, log_target=True, reduction="sum")) / part.numel())
    return {"weights": math.sqrt(moved / size), "kl": mean(found)}


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
