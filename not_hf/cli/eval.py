"""`not-hf eval`."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from not_hf.cli.app import Result, command
from not_hf.cli.loading import has_organ, load_model
from not_hf.cli.options import Base, Column, Data, Model, SampleBy, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@command("not-hf eval gpt2-kjv --data held-out.txt", name="eval")
def evaluate(
    model: Model,
    data: Data,
    base: Base = None,
    column: Column = "text",
    split: Split = "train",
    sample_by: SampleBy = None,
    without_organ: Annotated[
        bool, typer.Option("--without-organ/--no-without-organ", help="Also measure without the organ.")
    ] = True,
) -> Result:
    """Measure perplexity on text, with the organ and without it. The rows of the text are scored as one stream."""
    from not_hf import load_text

    texts = load_text(data, split=split, column=column, sample_by=sample_by)["text"]
    loaded, tokenizer = load_model(model, base)
    found = measure(loaded, tokenizer, texts, without_organ and has_organ(loaded))
    table = Table("", "perplexity", title=f"{model} on {data}", title_justify="left")
    for name, key in (("without the organ", "before"), ("with the organ", "after")):
        if key in found:
            table.add_row(name if has_organ(loaded) else model, f"{found[key]:,.3f}")
    if "before" in found:
        table.add_row("change", f"{100 * (found['after'] / found['before'] - 1):+.1f} %")
    document = {
        "model": model,
        "data": data,
        "num_tokens": found["num_tokens"],
        "perplexity": found["after"],
        "perplexity_without_organ": found.get("before"),
    }
    return Result(document, table)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], without_organ: bool = True
) -> dict[str, float]:
    """Measure the perplexity of texts as one stream.

    Returns:
        `num_tokens`, tokens per `window` (a new one begins after half of them), perplexity `after` the transplant and,
        if wanted, `before` it: without the organ.
    """
    from not_hf import perplexity
    from not_hf.evaluation.perplexity import default_window

    window = default_window(model)
    how: dict[str, Any] = {
        "add_start_token": tokenizer.bos_token is not None,
        "max_length": window,
        "stride": window // 2,
        "batch_size": 1 if model.device.type == "cpu" else 16,  # a CPU is busy with one, and the progress bar moves
    }

    def score() -> dict[str, Any]:
        found = perplexity.compute(predictions=[stream], model=model, tokenizer=tokenizer, **how)
        assert found is not None  # it is None on other processes than the main one
        return found

    stream = "\n".join(texts)
    found = score()
    measured = {"after": found["perplexity"], "num_tokens": found["num_tokens"], "window": window}
    if without_organ:
        with model.disable_donors():
            measured["before"] = score()["perplexity"]
    return measured
