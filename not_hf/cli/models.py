"""Commands that run a transplanted model: `eval` and `generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from not_hf.cli.options import Base, Column, Data, Model, Split
from not_hf.cli.run import Result, command

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@command("not-hf eval gpt2-kjv --data held-out.txt", name="eval")
def evaluate(
    model: Model,
    data: Data,
    base: Base = None,
    column: Column = "text",
    split: Split = "train",
    without_organ: Annotated[
        bool, typer.Option("--without-organ/--no-without-organ", help="Also measure it without the organ.")
    ] = True,
) -> Result:
    """Measure perplexity on text, with the organ and without it. The rows of the text are scored as one stream."""
    from not_hf.training.data import load_text

    texts = load_text(data, split=split, column=column)["text"]
    loaded, tokenizer = load(model, base)
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


@command('not-hf generate gpt2-kjv "In the beginning" --compare')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to go on from.", show_default=False)],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to write.")] = 40,
    compare: Annotated[bool, typer.Option("--compare", help="Also without the organ, side by side.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template to the prompt.")] = False,
) -> Result:
    """Write text, greedily: the same prompt gives the same text."""
    from not_hf.errors import NotHFError

    loaded, tokenizer = load(model, base)
    if compare and not has_organ(loaded):
        raise NotHFError(f"{model} has no organ to compare with and without; leave out --compare")
    text = _continuation(loaded, tokenizer, prompt, max_new_tokens, chat)
    document = {"model": model, "prompt": prompt, "text": text}
    if not compare:
        return Result(document, text if chat else prompt + text)
    with loaded.disable_donors():
        document["text_without_organ"] = _continuation(loaded, tokenizer, prompt, max_new_tokens, chat)
    table = Table("without the organ", "with the organ", title=prompt, title_justify="left")
    table.add_row(document["text_without_organ"], text)
    return Result(document, table)


def load(model: str, base: str | None) -> tuple[Any, PreTrainedTokenizerBase]:
    """A model with or without organs, on the accelerator if there is one, and its tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from not_hf import TransplantedForCausalLM

    tokenizer = AutoTokenizer.from_pretrained(base or model)
    loaded: Any
    if base:
        loaded = TransplantedForCausalLM.from_pretrained(base, model)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(model)
    return loaded.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"), tokenizer


def has_organ(model: PreTrainedModel) -> bool:
    """Whether it carries organs that can be switched off."""
    from not_hf import TransplantedForCausalLM

    return isinstance(model, TransplantedForCausalLM)


def measure(
    model: Any, tokenizer: PreTrainedTokenizerBase, texts: Iterable[str], without_organ: bool = True
) -> dict[str, float]:
    """Perplexity of the texts as one stream: `after` the transplant and, if wanted, `before` it."""
    from not_hf import perplexity

    def score() -> dict[str, Any]:
        has_start = tokenizer.bos_token is not None
        found = perplexity.compute(predictions=[stream], model=model, tokenizer=tokenizer, add_start_token=has_start)
        assert found is not None  # it is, on the main process
        return found

    stream = "\n".join(texts)
    found = score()
    measured = {"after": found["perplexity"], "num_tokens": found["num_tokens"]}
    if without_organ:
        with model.disable_donors():
            measured["before"] = score()["perplexity"]
    return measured


def _continuation(model: Any, tokenizer: Any, prompt: str, max_new_tokens: int, chat: bool) -> str:
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    with _token_bar(max_new_tokens) as streamer:
        output = model.generate(
            **inputs.to(model.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            temperature=None,  # these three would only make transformers warn that greedy search ignores them
            top_p=None,
            top_k=None,
            streamer=streamer,
        )
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


@contextlib.contextmanager
def _token_bar(total: int) -> Iterator[Any]:
    """A progress bar in the shape of the streamer that `generate` reports to."""
    from transformers.generation.streamers import BaseStreamer

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Generating", total=total)

        class Streamer(BaseStreamer):
            def put(self, value: Any) -> None:
                progress.advance(task, value.numel() if value.ndim == 1 else 0)  # the prompt comes as (batch, seq)

            def end(self) -> None: ...

        yield Streamer()
