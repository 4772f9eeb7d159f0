"""Perplexity of a model with an organ that was trained a short while at each of several positions."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import hashlib
import itertools
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from typing import Any

import numpy as np
import torch
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments

from not_hf.architecture.layers import eval_mode
from not_hf.architecture.releases import is_checkpointing, stop_checkpointing
from not_hf.composition.sources import DonorLike
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, NotHFError
from not_hf.evaluation.position_sweep import PositionSweep, make_sweep, require_positions
from not_hf.evaluation.sweep_record import complete, donor_digest, read_record
from not_hf.evaluation.swept_places import BASE, SweptPlace, legal_places, require_same, taking_organs
from not_hf.evaluation.swept_text import SweptText
from not_hf.recipient.mixin import Recipient
from not_hf.training.trainer import DonorTrainer

_SET_BY_TRAINERS = ("use_cache", "bos_token_id", "eos_token_id", "pad_token_id")  # in configs
_PATHS = ("output_dir", "logging_dir", "run_name")  # arguments of a trainer that do not change what is learnt
_DIGESTED_ROWS = 1000  # of a stream


def train_positions(
    model: PreTrainedModel | str | os.PathLike[str],
    donor: DonorLike | Callable[[int, str], DonorModel],
    data: Iterable[str] | Iterable[Mapping[str, Any]],
    positions: Iterable[int],
    modes: Sequence[str] = ("insert",),
    *,
    train_dataset: Any,
    args: TrainingArguments,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    add_start_token: bool = True,
    batch_size: int = 16,
    seed: int = 0,
    **trainer_kwargs: Any,
) -> PositionSweep:
    """Train an organ a short while at each of a few positions, and measure perplexity on text set aside.

    `sweep_positions` shows where layers as they are do least harm; this shows where training them pays. At each
    position a `DonorTrainer` begins with the organ as it was given, with the same arguments, seed and order of the
    data. What it has learnt is measured and discarded: train longer at the position that you choose.

    Args:
        model: A causal LM, with organs or without, which is left as it was; or its Hub ID or folder. Organs that are
            active stay so, and are frozen meanwhile.
        donor: Folder, Hub ID or `DonorModel`. Or a function of a position and a mode that returns one, to try other
            layers at each position: `lambda i, mode: DonorModel.from_base(model, (i, i + 3), i, mode)`. It must
            return the same donor whenever it is called, and not change the model.
        data: What is measured, as for `sweep_positions`; use text that is not trained on.
        positions: Positions among the model's own layers. Those that the organ does not fit are skipped.
        modes: `"insert"`, `"replace"` or both.
        train_dataset: As for `DonorTrainer`.
        args: As for `DonorTrainer`: `max_steps`, `learning_rate`, … No checkpoints are saved.
        tokenizer: As for `sweep_positions`, like `max_length`, `stride`, `add_start_token`, `batch_size` and `seed`.
        folder: Where `sweep.json` is written after each position. If it holds one of the same organ, text and
            training, only the positions that are missing there are trained. Not compared are what a function does,
            what a stream yields after its first 1,000 rows, and what arguments hold that are no dataclasses.
        **trainer_kwargs: For `DonorTrainer`: `data_collator`, `optimizer`, `cache_prefix`, `callbacks`, …

    Returns:
        As `sweep_positions`: perplexities after training, and `base` without the organ.

    Raises:
        IncompatibleDonorError: The organ fits no position; with the reason of the first.
        NotHFError: As in `sweep_positions`; `load_best_model_at_end` is set; or the folder holds another training, or
            the sweep of another model.

    Examples:
        >>> import tempfile
        >>> from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
        >>> from not_hf import DonorModel, train_positions
        >>> shape = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2}
        >>> base = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=4))
        >>> blocks = [{"input_ids": [*range(n, n + 9)], "labels": [*range(n, n + 9)]} for n in range(40)]
        >>> args = TrainingArguments(tempfile.mkdtemp(), max_steps=2, report_to="none", disable_tqdm=True)
        >>> donor = DonorModel.from_base(base, layers=(1, 2), init="identity")
        >>> found = train_positions(base, donor, blocks[32:], [0, 4], train_dataset=blocks[:32], args=args)
        {...}
        >>> [row["position"] for row in found.rows]
        [0, 4]
    """
    wanted = require_positions([] if positions is None else positions, modes) or []
    if args.load_best_model_at_end:
        raise NotHFError("train_positions saves no checkpoints to load the best of; leave load_best_model_at_end out")
    lengths = (max_length, stride, batch_size)
    name = os.fspath(donor) if isinstance(donor, str | os.PathLike) else None
    organ: Any = donor if name is None else DonorModel.from_pretrained(name)
    text = SweptText.of(model, organ, data, tokenizer, add_start_token, *lengths, caller="train_positions")
    places, skipped = _places(text, organ, wanted, modes)
    about: dict[str, Any] = {
        "donor": name,
        "donor_digest": donor_digest(organ) if isinstance(organ, DonorModel) else None,
        "training_digest": _digest(train_dataset, args, trainer_kwargs),
        **text.about,
        "seed": seed,
    }
    tokens = text.num_tokens
    nats = {key: np.full(len(tokens), np.nan) for key in (BASE, *(place.key for place in places))}
    if folder is not None:
        nats |= read_record(folder, about, len(tokens))

    def result(keys: Iterable[str]) -> PositionSweep:
        return make_sweep(nats, keys, tokens, skipped, about)

    with _frozen(text, _at(organ, places[0]), places[0]) as recipient:
        base = text.score()
        require_same(nats[BASE], base)
        nats[BASE] = np.array(base)
        for place in tqdm(places, desc="Positions", delay=2, leave=False):
            if np.isnan(nats[place.key]).any():
                with _placed(recipient, _at(organ, place), text.free_name, place):
                    _train(recipient, args, train_dataset, trainer_kwargs)
                    nats[place.key] = np.array(text.score())
                if folder is not None:
                    result(complete(nats)).save(folder)
    return result([*(place.key for place in places), *complete(nats)])


def _at(organ: DonorModel | Callable[[int, str], DonorModel], place: SweptPlace) -> DonorModel:
    return organ if isinstance(organ, DonorModel) else organ(place.position, place.mode)


def _places(
    text: SweptText,
    organ: DonorModel | Callable[[int, str], DonorModel],
    positions: Iterable[int],
    modes: Iterable[str],
) -> tuple[list[SweptPlace], list[dict[str, Any]]]:
    """Find the places that the organ, or the one of that place, fits. Returns and raises as `legal_places`."""
    places: list[SweptPlace] = []
    skipped: list[dict[str, Any]] = []
    for mode, position in itertools.product(dict.fromkeys(modes), sorted(set(positions))):
        try:
            there = _at(organ, SweptPlace(position, mode, entry=0))
            places += legal_places(text.model, there, text.free_name, [position], [mode])[0]
        except IncompatibleDonorError as error:
            skipped.append({"position": position, "mode": mode, "reason": str(error)})
    if not places:
        raise IncompatibleDonorError(skipped[0]["reason"])
    return places, skipped


@contextlib.contextmanager
def _frozen(text: SweptText, organ: DonorModel, place: SweptPlace) -> Iterator[Recipient]:
    """Have the model of a text take organs inside the block, its own parameters frozen; then it is as it was."""
    with (
        taking_organs(text.model, organ, text.free_name, place) as recipient,
        eval_mode(recipient),
        _restored(recipient),
    ):
        recipient.requires_grad_(False)
        yield recipient


@contextlib.contextmanager
def _restored(model: Any) -> Iterator[None]:
    """Undo after the block what a trainer changes of a model beside what it trains."""
    device, is_checkpointed = model.device, is_checkpointing(model)
    kept = [(parameter, parameter.requires_grad, parameter.grad) for parameter in model.parameters()]
    settings = [vars(each) for each in (model.config, getattr(model, "generation_config", None)) if each is not None]
    before = [{key: values[key] for key in _SET_BY_TRAINERS if key in values} for values in settings]
    try:
        yield
    finally:
        for values, own in zip(settings, before, strict=True):
            for key in _SET_BY_TRAINERS:
                values.pop(key, None)
            values.update(own)
        if not is_checkpointed:
            stop_checkpointing(model)
        if model.device != device:  # it is moved to the accelerator
            model.to(device)
        for parameter, flag, gradient in kept:
            parameter.requires_grad_(flag)
            parameter.grad = gradient


@contextlib.contextmanager
def _placed(recipient: Recipient, organ: DonorModel, name: str, place: SweptPlace) -> Iterator[None]:
    recipient.load_donor(organ, name, position=place.position, mode=place.mode, is_trainable=True)
    try:
        yield
    finally:
        recipient.delete_donor(name)


def _train(recipient: Recipient, args: TrainingArguments, train_dataset: Any, trainer_kwargs: dict[str, Any]) -> None:
    args = copy.copy(args)
    args.save_strategy = "no"
    trainer = DonorTrainer(recipient, args, train_dataset=train_dataset, **trainer_kwargs)
    try:
        trainer.train()
    finally:
        trainer.accelerator.unwrap_model(recipient, keep_fp32_wrapper=False)  # `forward` is the model's own again


def _digest(train_dataset: Any, args: TrainingArguments, trainer_kwargs: Mapping[str, Any]) -> str:
    """Digest the arguments of a training, as far as they can be compared, and its rows; of a stream the first ones."""
    values = {key: value for key, value in args.to_dict().items() if key not in _PATHS}
    digest = hashlib.sha256(repr((sorted(values.items()), _told(trainer_kwargs))).encode())
    count = len(train_dataset) if isinstance(train_dataset, Sized) else _DIGESTED_ROWS
    for row in itertools.islice(train_dataset, count):
        digest.update(repr([(key, _plain(value)) for key, value in sorted(row.items())]).encode())
    return digest.hexdigest()


def _told(value: Any) -> Any:
    """Return what tells an argument from others: numbers, texts, names of classes and functions, and their parts."""
    if isinstance(value, Mapping):
        return sorted((str(key), _told(each)) for key, each in value.items())
    if isinstance(value, list | tuple):
        return [_told(each) for each in value]
    if isinstance(value, str | int | float | torch.dtype | None):
        return value
    named = value if hasattr(value, "__qualname__") else type(value)
    is_filled = dataclasses.is_dataclass(value) and named is not value
    parts = [_told(getattr(value, each.name)) for each in dataclasses.fields(value)] if is_filled else []
    return [named.__module__, named.__qualname__, *parts]


def _plain(value: Any) -> Any:
    """Return the numbers of a tensor or array, of which `repr` leaves some out; other values as they are."""
    return value.tolist() if hasattr(value, "tolist") else value
