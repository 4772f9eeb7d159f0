"""The paper's first question: where in the stack should an organ stand?

    python benchmarks/paper/position.py              # SmolLM2, an hour of one core; --base small-gpt2 and so on
    python benchmarks/paper/position.py --quick      # fewer rows and steps, one seed, two minutes
    python benchmarks/paper/position.py --smoke      # a small random model, for the test suite
    python benchmarks/paper/position.py --report     # answer and picture of the runs so far

The paper (arXiv 2601.13580) cuts three layers a third of the way up, trains them and inserts them anew; it finds early
positions best: 1 of 12 in GPT-2, 3 of 22 in TinyLlama, 4 of 24 in GPT-OSS. Here the organ is cut from the same place.
It is measured on King James

- untrained, at every position, inserted and in place of layers (`sweep_positions`): a copy, and one whose layers begin
  as a no-op (`init="identity"`), so that in place of layers it leaves them out;
- moved: trained right behind the layers that it was cut from, then at every position without further training;
- trained at each of a few positions (`train_positions`), three seeds, the same rows at each, the learning rate
  searched once for each kind of organ, at that place. Then the control (English encyclopedia) is measured, too.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import SEARCH_SEED, Method, Prepared, fit, load, training_arguments  # noqa: E402 (from the folder above)
from position_report import details, draw, find, headline  # noqa: E402
from question import ask, parser_of, size_of  # noqa: E402
from texts import read_blocks  # noqa: E402

CONTROL, DOMAIN = "english", "kjv"
KINDS = (("insert", "copy"), ("insert", "identity"), ("replace", "copy"))  # of organs that are trained
FULL: dict[str, Any] = {
    **{"layers": 3, "block": 128, "swept": 16, "choose": 16, "held": 64, "every": 1},
    **{"steps": 16, "batch": 2, "rates": [2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2], "seeds": 3},
    "places": ["first", "early", "home", "late"],
}
SMALL = {**FULL, "swept": 2, "held": 2, "steps": 2, "rates": [5e-4], "seeds": 1, "places": ["early", "late"]}
FORMS = {"full": FULL, "quick": {**SMALL, "every": 10}, "smoke": {**SMALL, "layers": 1, "block": 32}}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Sweep, search rates, train, answer."""
    parser = parser_of(__file__, "Where an organ should stand.", FORMS)
    return ask(parser, arguments, run_once, run_all, (find, headline, details, draw))


def run_all(record: Any, options: Any, pool: Any) -> None:
    """Every sweep and training."""
    size = size_of(options, FORMS)
    run = functools.partial(record, **{name: size[name] for name in ("layers", "block", "steps", "batch")})

    def search(kind: tuple[str, str]) -> float:
        mode, init = kind

        def loss(rate: float) -> float:
            given = {"mode": mode, "init": init, "rate": rate, "seed": SEARCH_SEED, "places": ["home"]}
            return run(**given, rows={"choose": size["choose"]})["places"][0]["choose"]

        return min(size["rates"], key=loss) if len(size["rates"]) > 1 else size["rates"][0]

    def train(kind: tuple[str, str], seed: int) -> None:
        given = {"rate": rates[kind], "seed": seed, "places": size["places"]}
        run(mode=kind[0], init=kind[1], **given, rows={"domain": size["held"], "control": size["held"]})

    def sweep(init: str, rate: float) -> None:
        run(mode="both", init=init, rate=rate, seed=0, places=size["every"], rows={"domain": size["swept"]})

    rates = dict(zip(KINDS, pool.map(search, KINDS), strict=True))
    sweeps = [("copy", 0.0), ("identity", 0.0), ("copy", rates["insert", "copy"])]
    list(pool.map(lambda each: sweep(*each), sweeps))
    list(pool.map(lambda each: train(*each), itertools.product(KINDS, range(size["seeds"]))))


def run_once(
    base: str, mode: str, init: str, layers: int, places: Any, rows: dict[str, int], block: int, steps: int,
    batch: int, rate: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Losses (nats per token) with the organ at each place, and without it.

    Args:
        layers: How many layers the organ has.
        places: Names of positions at each of which the organ is trained; or 1: every position, 2: every second one,
            and so on, at which it is put as it is, trained at home before if there is a rate.
        rows: Held-out rows of each part: `"choose"`, `"domain"`, `"control"`.
    """
    import torch
    from transformers import AutoTokenizer

    from not_hf import DonorModel, sweep_positions, train_positions

    read = functools.partial(read_blocks, tokenizer=AutoTokenizer.from_pretrained(base), block=block)
    parts = {"choose": (DOMAIN, "choose"), "domain": (DOMAIN, "test"), "control": (CONTROL, "test")}
    held = [
        row for part, most in rows.items() for row in read(parts[part][0], most=most, part=parts[part][1]).tolist()
    ]
    data, lengths = [{"input_ids": row} for row in held], {"max_length": block, "stride": block, "batch_size": 4}
    trained = [(row, row) for row in read(DOMAIN, most=steps * batch, part="train", seed=seed).tolist()]
    model = load(base)
    depth = model.config.num_hidden_layers
    begin = -(-depth // 3)
    torch.manual_seed(seed)
    donor = DonorModel.from_base(model, (begin, begin + layers), init=init)
    given = {"rate": rate, "batch": batch, "steps": steps, "seed": seed}
    if isinstance(places, int):
        if rate:
            donor = trained_at_home(model, donor, base, trained, given)
        sweep = sweep_positions(model, donor, data, range(0, depth + 1, places), ("insert", "replace"), **lengths)
    else:
        home = begin if mode == "replace" else begin + layers
        positions = {"first": 0, "early": depth // 8, "home": home, "late": 3 * depth // 4}
        dataset = [{"input_ids": row, "labels": row} for row, _ in trained]
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
            training = {"train_dataset": dataset, "args": training_arguments(folder, **given)}
            wanted = {positions[place] for place in places}
            sweep = train_positions(model, donor, data, wanted, (mode,), **training, **lengths)

    def losses(key: str) -> dict[str, float]:
        nats, ends = sweep.nats[key], [0, *itertools.accumulate(rows.values())]
        tokens = block - 1
        return {
            part: round(math.fsum(nats[i:j]) / (j - i) / tokens, 5)
            for part, (i, j) in zip(rows, itertools.pairwise(ends), strict=True)
        }

    found = [{**row, **losses(f"{row['mode']} {row['position']}")} for row in sweep.rows]
    keys = ("mode", "position", *rows)
    return {
        "depth": depth,
        "cut_from": begin,
        "base_losses": losses("base"),
        "places": [{key: row[key] for key in keys} for row in found],
    }


def trained_at_home(model: Any, donor: Any, base: str, rows: list[Any], given: dict[str, Any]) -> Any:
    """The organ after training it where its config says, in a model that is then as it was."""
    from not_hf import DonorModel, TransplantedForCausalLM

    model = TransplantedForCausalLM.from_pretrained(model, donor, is_trainable=True)
    fit(Prepared(model, Method((), donor_trainer=True), base), rows, **given)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        trained = DonorModel.from_pretrained(folder)
    model.unload()
    return trained


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
