"""The paper's third question: can several organs be put into one model?

    python benchmarks/paper/several_organs.py            # one seed, an hour of one core
    python benchmarks/paper/several_organs.py --quick    # inserted organs only, fewer steps and rows
    python benchmarks/paper/several_organs.py --smoke    # a small random model, for the test suite
    python benchmarks/paper/several_organs.py --report   # answer and picture of the runs so far

The paper (arXiv 2601.13580) proposes a library of organs, of which a model gets those that it needs. Each method is
trained on King James and, from the base again, on the medical codes. What it learned is saved, and both are put into
one model without further training, each with a weight of 1 and of 0.5. Adapters: PEFT's `add_weighted_adapter` with
"cat", which adds up what they change. Organs of the same layers: `average_donors` with "task_arithmetic", which does
the same. Organs of different layers, the lower half and the upper half: both are active.

Inserted organs, each trained at the same place, are stacked there, in either order; averaged into one organ
(`average_donors`); or summed, as what training changed in both. Or they are trained at two places, a third and two
thirds of the way up, and both active. Or one after the other: the second is trained on top of the first, which is
frozen. Besides, one organ is trained on both texts, with the steps of two. In Gemma, whose norms undo the scale of an
inserted organ, that has a weight of 1 only.

Measured: the loss on 8,192 held-out tokens of both texts and of a general one. Learning rates are the middle ones of
those that `methods.py` lists, or `bases.py` for a base to which those do not apply.
"""

from __future__ import annotations

import functools
import itertools
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from bases import RATES, middle_rate

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, REFERENCE, Prepared, cut, fit, load, mean, prepare, row_losses  # noqa: E402 (folder above)
from question import ask, parser_of  # noqa: E402
from several_report import CONTROL, DOMAINS, details, draw, find, headline  # noqa: E402
from texts import read_blocks  # noqa: E402

INSERTED = "organ, inserted"
IN_TURN, JOINT = "organs inserted one after the other", "one organ of both texts"
ONE_PLACE = "organs inserted at one place"
WAYS = {  # what is trained on each text
    "LoRA, r = 16": (REFERENCE, REFERENCE),
    "organs of the same layers": ("organ, outputs",) * 2,
    "organs of different layers": ("organ, outputs of the lower half", "organ, outputs of the upper half"),
    ONE_PLACE: (INSERTED, INSERTED),
    "organs inserted at two places": (INSERTED, "organ, inserted higher"),
    IN_TURN: (INSERTED, INSERTED),
    JOINT: ("organ, outputs",),
}
WEIGHTS = (1.0, 0.5)
FORMS: dict[str, dict[str, Any]] = {
    "full": {"steps": 32, "block": 128, "held": 64},
    "quick": {"steps": 2, "block": 128, "held": 2},
    "smoke": {"steps": 2, "block": 32, "held": 2},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, put together, answer."""
    parser = parser_of(__file__, "Several organs in one model.", FORMS)
    return ask(parser, arguments, run_once, run_all, (find, headline, details, draw))


def run_all(record: Any, options: Any, pool: Any) -> None:
    """Each way with each seed."""
    ways = [ONE_PLACE] if options.form == "quick" else WAYS

    def run(pair: tuple[int, str]) -> None:
        seed, way = pair
        own = {"rates": {name: middle_rate(options.base, name) for name in WAYS[way]}} if options.base in RATES else {}
        record(way=way, seed=seed, **FORMS[options.form], **own)

    list(pool.map(run, [(seed, way) for seed in range(options.seeds or 1) for way in ways]))


def run_once(
    base: str, way: str, seed: int, steps: int, block: int, held: int, rates: dict[str, float] | None = None
) -> dict[str, Any]:
    """Train in a way, then measure each text's alone and what is put together.

    Args:
        rates: Of each method; default: the middle ones of those that `methods.py` lists.
    """
    from transformers import AutoTokenizer

    read = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    texts = {name: read(name, most=held, part="test") for name in (*DOMAINS, CONTROL)}
    learned = {name: read(name, most=steps * 4, part="train", seed=seed).tolist() for name in DOMAINS}

    def losses(model: Any) -> dict[str, list[float]]:
        return {name: row_losses(model, rows) for name, rows in texts.items()}

    def train(method: str, rows: list[Any], prepared: Prepared | None = None) -> Any:
        settings, prepared = METHODS[method].settings, prepared or prepare(method, base)
        rate, batch = settings[len(settings) // 2]
        how = {"rate": (rates or {}).get(method, rate), "batch": batch, "steps": len(rows) // batch, "seed": seed}
        fit(prepared, [(row, row) for row in rows], **how)
        return prepared.model

    found = {"base": losses(load(base))}  # before training, all are the base
    with tempfile.TemporaryDirectory() as scratch:
        if way == JOINT:
            rows = list(itertools.chain.from_iterable(zip(*learned.values(), strict=True)))
            found["both, 1"] = losses(train(*WAYS[way], rows))
        elif way == IN_TURN:
            for order in (DOMAINS, DOMAINS[::-1]):
                found[", then ".join(order)] = losses(in_turn(base, order, learned, train, Path(scratch)))
        else:
            folders = {domain: Path(scratch, domain) for domain in DOMAINS}
            for domain, method in zip(DOMAINS, WAYS[way], strict=True):
                model = train(method, learned[domain])
                found[f"{domain} alone"] = losses(model)
                model.save_pretrained(folders[domain])
                del model
            found |= {name: losses(model) for name, model in together(way, base, folders)}
    means = {what: {text: mean(losses) for text, losses in of.items()} for what, of in found.items()}
    return {"losses": means, "row_losses": found}


def in_turn(base: str, order: tuple[str, ...], learned: dict[str, Any], train: Any, scratch: Path) -> Any:
    """A model with an organ of the first text, frozen, and behind it one of the second, trained on top."""
    from not_hf import TransplantedForCausalLM

    first, second = order
    folder = scratch / f"{first} first"
    train(INSERTED, learned[first]).save_pretrained(folder)
    model = load(base)
    fresh = cut(METHODS[INSERTED], model)
    model = TransplantedForCausalLM.from_pretrained(model, folder, donor_name=first)
    model.load_donor(fresh, second, is_trainable=True)
    return train(INSERTED, learned[second], Prepared(model, METHODS[INSERTED], base, second))


def together(way: str, base: str, folders: dict[str, Path]) -> Iterator[tuple[str, Any]]:
    """Models with what was learned of both texts, one at a time, and how it was put together."""
    from not_hf import TransplantedForCausalLM, UnsupportedArchitectureError, average_donors

    methods = WAYS[way]
    for weight in WEIGHTS:
        name, model = f"both, {weight:g}", load(base)
        if methods[0] == REFERENCE:
            yield name, both_adapters(model, folders, weight)
        elif methods == ("organ, outputs",) * 2:
            donor = average_donors([*folders.values()], [weight, weight], "task_arithmetic", base=model)
            yield name, TransplantedForCausalLM.from_pretrained(model, donor)
        else:
            try:
                both = both_organs(model, folders, weight)
            except UnsupportedArchitectureError:  # in Gemma, norms undo the scale of an inserted organ
                if weight == 1:
                    raise
                continue
            yield name, both
    if way == ONE_PLACE:
        yield "both, the other order", both_organs(load(base), dict(reversed(folders.items())), 1.0)
        model = load(base)
        summed = average_donors([*folders.values(), cut(METHODS[INSERTED], model)], [1, 1, -1])  # both less the start
        for name, donor in {"averaged": average_donors([*folders.values()]), "summed": summed}.items():
            yield f"both, {name}", TransplantedForCausalLM.from_pretrained(load(base), donor)


def both_adapters(model: Any, folders: dict[str, Path], weight: float) -> Any:
    """A model with both LoRA adapters, each with that weight."""
    from peft import PeftModel

    first, second = folders
    model = PeftModel.from_pretrained(model, folders[first], adapter_name=first)
    model.load_adapter(folders[second], adapter_name=second)
    model.add_weighted_adapter(list(folders), [weight, weight], "both", combination_type="cat")
    model.set_adapter("both")
    return model


def both_organs(model: Any, folders: dict[str, Path], weight: float) -> Any:
    """A model with both organs active, each with that weight; at one place the first stands below the second."""
    from not_hf import TransplantedForCausalLM

    first, second = folders
    model = TransplantedForCausalLM.from_pretrained(model, folders[first], donor_name=first)
    model.load_donor(folders[second], second)
    for name in folders:
        model.set_donor_scale(name, weight)
    return model


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
