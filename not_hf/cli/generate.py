"""`not-hf generate`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from not_hf.cli.app import Result, command
from not_hf.cli.loading import has_organ, load_model
from not_hf.cli.options import Base, Model
from not_hf.errors import NotHFError, UnsupportedArchitectureError


@command('not-hf generate gpt2-kjv "In the beginning" --compare')
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="Text to continue.", show_default=False)],
    base: Base = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens to write.")] = 40,
    compare: Annotated[bool, typer.Option("--compare", help="Also without the organ, side by side.")] = False,
    chat: Annotated[bool, typer.Option("--chat", help="Apply the tokenizer's chat template to the prompt.")] = False,
) -> Result:
    """Write text by greedy search: the same prompt gives the same text."""
    loaded, tokenizer = load_model(model, base)
    if compare and not has_organ(loaded):
        raise NotHFError(f"{model} has no organ to compare with and without; leave out --compare")
    inputs = _encoded(loaded, tokenizer, prompt, chat)
    _check_context(loaded, inputs["input_ids"].shape[1], max_new_tokens)
    shared: dict[str, Any] = {}
    if compare:
        with contextlib.suppress(UnsupportedArchitectureError):  # then the prompt is read twice
            shared["prefill"] = loaded.prefill(inputs["input_ids"], inputs["attention_mask"])
    text = _continuation(loaded, tokenizer, inputs, max_new_tokens, **shared)
    document = {"model": model, "prompt": prompt, "text": text}
    if not compare:
        return Result(document, text if chat else prompt + text)
    with loaded.disable_donors():
        document["text_without_organ"] = _continuation(loaded, tokenizer, inputs, max_new_tokens, **shared)
    table = Table("without the organ", "with the organ", title=prompt, title_justify="left")
    table.add_row(document["text_without_organ"], text)
    return Result(document, table)


def _encoded(model: Any, tokenizer: Any, prompt: str, chat: bool) -> Any:
    if chat:
        inputs = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    if inputs["input_ids"].shape[1] == 0:
        raise NotHFError("the prompt is empty; give a text to continue")
    return inputs.to(model.device)


def _check_context(model: Any, length: int, max_new_tokens: int) -> None:
    from not_hf.evaluation.windows import context_of

    if getattr(model.config.get_text_config(), "rope_parameters", None):
        return  # rotary positions go on past the context, with a warning of transformers
    context = context_of(model.config)
    if length > context:
        raise NotHFError(f"the prompt has {length} tokens, and the context {context}; shorten the prompt")
    if max_new_tokens > (room := context - length + 1):  # the last token is not read
        raise NotHFError(
            f"after the {length} tokens of the prompt, the context of {context} tokens has room for {room} new ones, "
            f"not {max_new_tokens}; use --max-new-tokens {room}"
        )


def _continuation(model: Any, tokenizer: Any, inputs: Any, max_new_tokens: int, **options: Any) -> str:
    with _token_bar(max_new_tokens) as streamer:
        output = model.generate(
            **inputs,
            **options,
            max_new_tokens=max_new_tokens,
            do_sample=False,
            num_beams=1,
            num_return_sequences=1,
            cache_implementation=None,  # the prompt as it is may have been read, whole, into the usual one
            prefill_chunk_size=None,
            prompt_lookup_num_tokens=None,
            assistant_early_exit=None,
            token_healing=None,
            temperature=None,  # greedy search ignores these three, and transformers would warn about them
            top_p=None,
            top_k=None,
            return_dict_in_generate=False,
            tokenizer=tokenizer,  # stop strings need it
            streamer=streamer,
        )
    # some tokenizers leave out the space before the first token that they decode
    length = inputs["input_ids"].shape[1]
    prompt, whole = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (output[0, :length], output[0]))
    return whole[len(prompt) :]


@contextlib.contextmanager
def _token_bar(total: int) -> Iterator[Any]:
    """Show a progress bar, and yield a streamer for `generate` that advances it."""
    from transformers.generation.streamers import BaseStreamer

    with Progress(console=Console(stderr=True), transient=True) as progress:
        task = progress.add_task("Generating", total=total)

        class Streamer(BaseStreamer):
            def put(self, value: Any) -> None:
                progress.advance(task, value.numel() if value.ndim == 1 else 0)  # the prompt comes as (batch, seq)

            def end(self) -> None: ...

        yield Streamer()
