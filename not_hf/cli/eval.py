"""`not-hf eval`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from not_hf.cli.app import Result, command
from not_hf.cli.loading import has_organ, load_model
from not_hf.cli.options import Base, Column, Data, Model, SampleBy, Split

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_KINDS = ("perplexity", "nats_per_token", "bits_per_byte")


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
    """Measure perplexity on text, with the organ and without it. The rows of the text are scored as one stream.

    In brackets are 95 % intervals, over windows of the text. Bits per byte compare models with different tokenizers.
    A text with tokens for which only the organ has rows is measured with the organ only.
    """
    from not_hf import load_text

    texts = load_text(data, split=split, column=column, sample_by=sample_by)["text"]
    loaded, tokenizer = load_model(model, base)
    found = measure(loaded, tokenizer, texts, without_organ)
    after, before = found["after"], found.get("before")
    names = {"before": "without the organ", "after": "with the organ" if has_organ(loaded) else model}
    title = f"{model} on {data}, with 95 % intervals"
    table = Table("", *(kind.replace("_", " ") for kind in _KINDS), title=title, title_justify="left")
    for when in ("before", "after"):
        if when in found:
            table.add_row(names[when], *(_shown(found[when], kind) for kind in _KINDS))
    if "change" in found:
        table.add_row("change", *_changes(found["change"]))
    document = {
        "model": model,
        "data": data,
        **{key: after[key] for key in ("num_tokens", "num_bytes", *_KINDS, "confidence_interval")},
        "perplexity_without_organ": before and before["perplexity"],
        "without_organ": before and {key: before[key] for key in (*_KINDS, "confidence_interval")},
        "change": found.get("change"),
    }
    return Result(document, table)


def _shown(found: dict[str, Any], kind: str, write: Callable[[float], str] = "{:,.3f}".format) -> str:
    """Show a number and, if there is one, its interval."""
    ends = found["confidence_interval"][kind]
    return write(found[kind]) + (f" ({write(ends.low)} – {write(ends.high)})" if ends else "")


def _changes(change: dict[str, Any]) -> Iterator[str]:
    """Show what changes by the organ: of perplexity in per cent."""
    yield _shown(change, "perplexity_ratio", lambda ratio: f"{100 * (ratio - 1):+.1f} %")
    for kind in _KINDS[1:]:
        yield _shown(change, f"{kind}_difference", "{:+.3f}".format)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], without_organ: bool = True
) -> dict[str, dict[str, Any]]:
    """Measure the perplexity of texts as one stream.

    Returns:
        The results of `perplexity`: `after` the transplant; and, if wanted and an organ is active, `before` it,
        without the organ, and the `change`, as by `compare_perplexity`.
    """
    from not_hf import compare_perplexity
    from not_hf.evaluation.perplexity import Perplexity
    from not_hf.evaluation.windows import encode, needs_organs

    window = window_of(model)
    how: dict[str, Any] = {
        "add_start_token": tokenizer.bos_token is not None,
        "max_length": window,
        "stride": window // 2,
        "batch_size": 1 if model.device.type == "cpu" else 16,  # a CPU is busy with one, and the progress bar moves
    }
    stream = ["\n".join(texts)]
    without_organ = without_organ and has_organ(model)
    if without_organ and needs_organs(model, encode(stream, tokenizer, how["add_start_token"])[0]):
        typer.echo("not measured without the organ, which has the only rows for some tokens of the text", err=True)
        without_organ = False
    if without_organ:
        change = compare_perplexity(None, model, stream, tokenizer=tokenizer, **how)
        return {"before": change.pop("model_a"), "after": change.pop("model_b"), "change": change}
    after = Perplexity().compute(predictions=stream, model=model, tokenizer=tokenizer, **how)
    assert after is not None  # it is None on other processes than the main one
    return {"after": after}


def window_of(model: Any) -> int:
    """Return the tokens per window of `measure`; a new one begins after half of them."""
    from not_hf.evaluation.windows import context_of, default_window

    return default_window(context_of(model.config))
