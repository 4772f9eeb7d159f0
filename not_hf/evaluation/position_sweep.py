"""Perplexity of a model with an organ at every position that it fits."""

from __future__ import annotations

import math
import operator
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from huggingface_hub.utils import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from not_hf.cards.common import hub_id
from not_hf.composition.sources import DonorLike
from not_hf.config import MODES
from not_hf.donor.modeling import DonorModel
from not_hf.errors import NotHFError
from not_hf.evaluation.bootstrap import nll_intervals
from not_hf.evaluation.perplexity import perplexity_of
from not_hf.evaluation.position_plot import draw
from not_hf.evaluation.sweep_record import (
    complete,
    donor_digest,
    place_of,
    read_record,
    saving_in_time,
    write_record,
)
from not_hf.evaluation.swept_places import BASE, Nats, PlaceRunner, legal_places, taking_organs
from not_hf.evaluation.swept_text import SweptText

_PERPLEXITIES = ("perplexity", "low", "high")


@dataclass(frozen=True)
class PositionSweep:
    """Perplexities of a model with an organ at several positions.

    Args:
        rows: One dict for each place, in the order of modes and positions: `position`, `mode`, `nats_per_token`,
            `perplexity`, and `low` and `high`, the ends of its 95 % interval.
        base: The same of the model without the organ: `nats_per_token`, `perplexity`, `low`, `high`.
        skipped: The places that the organ does not fit: `position`, `mode` and `reason`.
        num_tokens: Number of scored tokens.
        about: What was measured: `model`, `donor`, digests of the organ and of the windows, and versions.
        window_tokens: Scored tokens of each window.
        nats: Summed negative log-likelihood of each window, by `"insert 4"` (mode and position) and `"base"`, for
            paired comparisons. NaN where an interrupted sweep has not measured yet.
    """

    rows: list[dict[str, Any]]
    base: dict[str, float]
    skipped: list[dict[str, Any]]
    num_tokens: int
    about: dict[str, Any]
    window_tokens: list[int] = field(repr=False)
    nats: dict[str, list[float]] = field(repr=False)

    @property
    def best(self) -> dict[str, Any]:
        """The row of the lowest perplexity."""
        return min(self.rows, key=lambda row: math.inf if math.isnan(row["nats_per_token"]) else row["nats_per_token"])

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `sweep.json` into a folder; created if missing. Numbers that are not finite are written as null."""
        windows = {"num_tokens": self.window_tokens, "nats": self.nats}
        measured = {"num_tokens": self.num_tokens, "base": self.base, "rows": self.rows, "skipped": self.skipped}
        write_record(folder, {**self.about, **measured, "windows": windows})

    def record(self, donor: DonorModel) -> None:
        """Note the best position in the config of the donor, for `from_pretrained(…, position="best")`; then save it.

        Perplexities go with it, unless they are of organs that `train_positions` has discarded.

        Raises:
            NotHFError: The sweep was of another organ, or that has diverged.
        """
        if not isinstance(donor, DonorModel):
            raise NotHFError(
                f"record needs a DonorModel, got {donor!r:.200}; load it with DonorModel.from_pretrained, then save it"
            )
        if donor_digest(donor) != self.about["donor_digest"]:
            raise NotHFError("the sweep was of another organ; record it in the donor that was swept")
        if math.isnan(self.best["nats_per_token"]):
            raise NotHFError("no position has a perplexity to record: the organ has diverged")
        best = {key: self.best[key] for key in ("position", "mode")}
        if "training_digest" not in self.about:
            beside = {"beside": self.about["beside"]} if self.about.get("beside") else {}
            best |= {"perplexity": self.best["perplexity"], "perplexity_without_organ": self.base["perplexity"]}
            best |= {"model": hub_id(self.about["model"]), **beside, "num_tokens": self.num_tokens}
        donor.config.best_position = best

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw perplexity over position with its interval, the base as a line, and the best position marked.

        Args:
            path: File to write: `.png`, or another format of matplotlib.

        Raises:
            NotHFError: matplotlib is not installed.
        """
        draw(self.rows, self.base, self.best, path)


def sweep_positions(
    model: PreTrainedModel | str | os.PathLike[str],
    donor: DonorLike,
    data: Iterable[str] | Iterable[Mapping[str, Any]],
    positions: Iterable[int] | None = None,
    modes: Sequence[str] = ("insert",),
    *,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    folder: str | os.PathLike[str] | None = None,
    max_length: int | None = None,
    stride: int | None = None,
    add_start_token: bool = True,
    batch_size: int = 16,
    max_bytes: int = 2**30,
    seed: int = 0,
) -> PositionSweep:
    """Measure perplexity with an organ, trained or not, at every position that it fits.

    The numbers are those of `perplexity` with the organ loaded at each position. The layers below a position are run
    once per window, not once per position, which takes a little more than half of the time. Where a model cannot start
    at a position, because its layers pass on more than hidden states, it is run whole, with a warning.

    `low` and `high` are the ends of a 95 % bootstrap interval of the perplexity: the percentiles of 1,000 draws of
    windows with replacement, the same ones at all positions. They say how much another text of the same kind might
    change the number, not how much another training might. With 20 windows or fewer they are somewhat too narrow, and
    with one they are NaN.

    Args:
        model: A causal LM, with organs or without, which is left as it was; or its Hub ID or folder. Organs that are
            active stay so.
        donor: Folder, Hub ID or `DonorModel`: one organ, no composition.
        data: Texts, scored as one stream; or a dataset with `input_ids`, whose rows are scored each on its own, but
            for the first token. Other columns are not read. Use text that was not trained on.
        positions: Positions among the model's own layers; `None`: all. Those that the organ does not fit are skipped.
        modes: `"insert"`, `"replace"` or both.
        tokenizer: The model's tokenizer, its Hub ID or folder; needed for texts, unless `model` is an ID or folder.
        folder: Where `sweep.json` is written while the sweep runs. If it holds one of the same organ and text, only
            what is missing there is measured: an interrupted sweep goes on, and a finished one takes more positions.
        max_length: Tokens per window, as for `perplexity`, like `stride` and `add_start_token`.
        batch_size: Windows per forward pass.
        max_bytes: Limit for the hidden states that are held at once; those of a batch are held in any case.
        seed: Of the bootstrap.

    Raises:
        IncompatibleDonorError: The organ fits no position; with the reason of the first.
        NotHFError: An argument is out of range, `data` has nothing to score, a tokenizer is missing, the model is
            inside `disable_donors()`, or the folder holds another sweep.
        UnsupportedArchitectureError: The model is no causal LM, or its layers cannot be found.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, sweep_positions
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3))
        >>> data = [{"input_ids": [n % 9 for n in range(start, start + 12)]} for start in range(5)]
        >>> sweep = sweep_positions(base, donor, data)
        >>> [row["position"] for row in sweep.rows], sweep.num_tokens
        ([0, 1, 2, 3, 4], 55)
        >>> sweep.best["low"] <= sweep.best["perplexity"] <= sweep.best["high"]
        True
    """
    wanted = require_positions(positions, modes)
    lengths = (max_length, stride, batch_size)
    organ = donor if isinstance(donor, DonorModel) else DonorModel.from_pretrained(donor)
    text = SweptText.of(model, organ, data, tokenizer, add_start_token, *lengths, caller="sweep_positions")
    places, skipped = legal_places(text.model, organ, text.free_name, wanted, dict.fromkeys(modes))
    about: dict[str, Any] = {
        "donor": None if isinstance(donor, DonorModel) else os.fspath(donor),
        "donor_digest": donor_digest(organ),
        **text.about,
        "seed": seed,
    }
    tokens = text.num_tokens
    nats = {key: np.full(len(tokens), np.nan) for key in (BASE, *(place.key for place in places))}
    if folder is not None:
        nats |= read_record(folder, about, len(tokens))

    def result(keys: Iterable[str]) -> PositionSweep:
        return make_sweep(nats, keys, tokens, skipped, about)

    def save() -> None:
        if folder is not None:
            result(complete(nats)).save(folder)

    missing = sum(int(np.isnan(nats[place.key]).sum()) for place in places)
    with (
        tqdm(desc="Positions", unit=" windows", total=missing, delay=2, leave=False) as bar,
        saving_in_time(save, nats) as save_in_time,
        taking_organs(text.model, organ, text.free_name, places[0]) as recipient,
    ):

        def note(num_windows: int) -> None:
            bar.update(num_windows)
            save_in_time()

        PlaceRunner(recipient, organ, text.free_name, text.ids, max_bytes).run(text.batches, places, nats, note)
    return result([*(place.key for place in places), *complete(nats)])


def require_positions(positions: Iterable[int] | None, modes: Sequence[str]) -> list[int] | None:
    """Check the arguments of a sweep, and return the positions as a list."""
    if not modes or isinstance(modes, str) or not set(modes) <= set(MODES):
        raise NotHFError(f"modes must be a list of {' and '.join(map(repr, MODES))}, got {modes!r:.200}")
    try:
        wanted = None if positions is None else [operator.index(each) for each in positions]
    except TypeError as error:
        raise NotHFError(f"positions must be a list of integers, got {positions!r:.200}") from error
    if wanted == []:
        raise NotHFError("positions must name at least one position; sweep_positions takes all if it is left out")
    return wanted


def make_sweep(
    nats: Nats, keys: Iterable[str], tokens: list[int], skipped: list[dict[str, Any]], about: dict[str, Any]
) -> PositionSweep:
    """Compute the numbers of the base and of the places with these keys."""
    num_tokens, chosen = sum(tokens), [BASE, *sorted(set(keys) - {BASE}, key=place_of)]
    sums = np.stack([nats[key] for key in chosen])  # (models, windows)
    lows, highs = nll_intervals(sums, np.asarray(tokens, dtype=np.float64), about["seed"])
    base, *rows = (
        {
            "nats_per_token": float(mean),
            **{name: perplexity_of(float(each)) for name, each in zip(_PERPLEXITIES, (mean, low, high), strict=True)},
        }
        for mean, low, high in zip(sums.sum(axis=1) / num_tokens, lows, highs, strict=True)
    )
    places = [dict(zip(("mode", "position"), place_of(key), strict=True)) for key in chosen[1:]]
    return PositionSweep(
        rows=[
            {"position": place["position"], "mode": place["mode"], **row}
            for place, row in zip(places, rows, strict=True)
        ],
        base=base,
        skipped=skipped,
        num_tokens=num_tokens,
        about=about,
        window_tokens=tokens,
        nats={key: each.tolist() for key, each in nats.items()},
    )
