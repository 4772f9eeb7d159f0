"""Score windows under a model with an organ at each of several places. What the places share is run once."""

from __future__ import annotations

import contextlib
import itertools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import PreTrainedModel

from not_hf.architecture.devices import input_device
from not_hf.architecture.layers import eval_mode
from not_hf.architecture.partial_forward import PartialForward
from not_hf.architecture.stack import find_stack, layers_config
from not_hf.composition.check import examine
from not_hf.composition.resolve import resolve_organ
from not_hf.composition.sources import OrganSource
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import held_by
from not_hf.errors import IncompatibleDonorError, NotHFError, UnsupportedArchitectureError
from not_hf.evaluation.windows import Window, nll_of
from not_hf.recipient.heads import class_of
from not_hf.recipient.mixin import Recipient

logger = logging.getLogger(__name__)

BASE = "base"  # the key of the model without the organ

Nats = Mapping[str, NDArray[np.float64]]
"""Summed nats of each window, `(windows,)`, by the key of a place or `BASE`; NaN where not measured."""


class SweptPlace(NamedTuple):
    """A place of the organ."""

    position: int
    mode: str
    entry: int  # index of the organ's first layer in the stack: the layers before it are the model's own

    @property
    def key(self) -> str:
        """Its name among the measurements."""
        return f"{self.mode} {self.position}"


def legal_places(
    model: PreTrainedModel, donor: DonorModel, name: str, positions: Iterable[int] | None, modes: Iterable[str]
) -> tuple[list[SweptPlace], list[dict[str, Any]]]:
    """Find the places of a model that an organ fits.

    Args:
        model: The recipient, with other organs or without.
        donor: The organ.
        name: A name for it that is free in the model.
        positions: Those to look at; `None`: all.
        modes: Those to look at.

    Returns:
        The places, and the others as `position`, `mode` and `reason`.

    Raises:
        IncompatibleDonorError: It fits none; with the first reason.
    """
    config = layers_config(getattr(model, "base_config", model.config))
    loaded = list(model._surgery.organs.values()) if isinstance(model, Recipient) else []
    places: list[SweptPlace] = []
    skipped: list[dict[str, Any]] = []
    for mode in modes:
        room = config.num_hidden_layers - (donor.config.num_organ_layers if mode == "replace" else 0)
        for position in range(max(room, 0) + 1) if positions is None else sorted(set(positions)):
            organ = resolve_organ(OrganSource(name, donor, position=position, mode=mode), {})
            fit = examine([organ], config, loaded)
            if fit.problems:
                skipped.append({"position": position, "mode": mode, "reason": "; ".join(fit.problems)})
            else:
                entry = next(n for n, layer in enumerate(fit.stack) if layer.organ == name)
                places.append(SweptPlace(position, mode, entry))
    if not places:
        raise IncompatibleDonorError(skipped[0]["reason"])
    return places, skipped


@contextlib.contextmanager
def taking_organs(model: PreTrainedModel, donor: DonorModel, name: str, place: SweptPlace) -> Iterator[Recipient]:
    """Have a model take the organ inside the block, which begins and ends without it.

    The organ is loaded once at the place, so what keeps it from being loaded is raised, and what differs is warned of,
    here.

    Raises:
        NotHFError: The model is inside `disable_donors()`.
    """
    is_native = not isinstance(model, Recipient)
    where: dict[str, Any] = {"donor_name": name, "position": place.position, "mode": place.mode}
    try:
        if isinstance(model, Recipient):
            model.load_donor(donor, **where)
        else:
            model = class_of(model).from_pretrained(model, donor, **where)
        if name not in model.active_donors:
            raise NotHFError(
                "the model is inside disable_donors(), where no organ runs; call this outside of the block"
            )
        model.delete_donor(name)
        yield model
    finally:
        if isinstance(model, Recipient):
            if name in model.donor_config:
                model.delete_donor(name)
            if is_native:
                model.unload()


class PlaceRunner:
    """Scores windows under a model without an organ and with it at several places.

    An organ leaves all layers before it, and what they compute, as they are. So the model runs once over some windows;
    its hidden states at the entry of each place are held, and at each place the rest runs from there. Whether it can
    is tried first; where layers pass on more than hidden states, the model is run whole.

    Args:
        model: The model, as `taking_organs` yields it.
        donor: The organ.
        name: Its name.
        texts: Token ids of the texts that the windows are of.
        max_bytes: Limit for the hidden states that are held, except that they are those of one batch at least.
    """

    def __init__(self, model: Recipient, donor: DonorModel, name: str, texts: list[list[int]], max_bytes: int) -> None:
        self.model, self.donor, self.name, self.texts, self.max_bytes = model, donor, name, texts, max_bytes
        self.shares_base = not held_by(donor)  # else the organ may bring its own embeddings
        try:
            self.forward: PartialForward | None = PartialForward(find_stack(model), entry=1)
        except UnsupportedArchitectureError:
            self.forward = None
            logger.warning("model_type %r cannot run in parts: every position is run whole", model.config.model_type)

    def run(
        self,
        batches: Sequence[list[Window]],
        places: Sequence[SweptPlace],
        nats: Nats,
        progress: Callable[[int], Any],
    ) -> None:
        """Measure what is missing in `nats`, in which results are put.

        Args:
            batches: The windows, in the order of the measurements.
            places: The places.
            nats: The measurements.
            progress: Is called with the number of windows each time that some have been measured at a place.

        Raises:
            NotHFError: The model without the organ is not the one that was measured before.
        """
        places = sorted(places, key=lambda place: -place.entry)  # the first one passes the entries of all others
        ends = list(itertools.accumulate(len(batch) for batch in batches))
        parts = [(slice(end - len(batch), end), batch) for batch, end in zip(batches, ends, strict=True)]
        with eval_mode(self.model):
            entries = self._startable({place.entry for place in places} - {0})
            for chunk in self._chunks(parts, len(entries)):
                self._run_chunk(chunk, places, entries, nats, progress)

    def _chunks(
        self, parts: Iterable[tuple[slice, list[Window]]], num_entries: int
    ) -> Iterator[list[tuple[slice, list[Window]]]]:
        """Group batches whose hidden states, at so many entries, can be held together."""
        per_token = num_entries * layers_config(self.model.config).hidden_size * self.model.dtype.itemsize
        chunk: list[tuple[slice, list[Window]]] = []
        held = 0
        for part in parts:
            size = per_token * len(part[1]) * max(window.end - window.begin for window in part[1])
            if chunk and held + size > self.max_bytes:
                yield chunk
                chunk, held = [], 0
            chunk.append(part)
            held += size
        yield chunk

    def _run_chunk(
        self,
        chunk: Sequence[tuple[slice, list[Window]]],
        places: Sequence[SweptPlace],
        startable: set[int],
        nats: Nats,
        progress: Callable[[int], Any],
    ) -> None:
        span = slice(chunk[0][0].start, chunk[-1][0].stop)
        left = [place for place in places if np.isnan(nats[place.key][span]).any()]
        if not left and not np.isnan(nats[BASE][span]).any():
            if span.start == 0:  # a record may be whole, and of another model
                where, batch = chunk[0]
                require_same(nats[BASE][where], nll_of(self.model, self.texts, batch))
            return
        entries = {place.entry for place in left} & startable
        held: list[dict[int, torch.Tensor]] = [{} for _ in chunk]
        for (where, batch), hidden in zip(chunk, held, strict=True):
            found = self._score(batch, hidden, None, entries if self.shares_base else ())
            require_same(nats[BASE][where], found)
            nats[BASE][where] = found
        for place in left:
            passed = [entry for entry in entries if entry <= place.entry]
            with self._at(place):
                for (where, batch), hidden in zip(chunk, held, strict=True):
                    nats[place.key][where] = self._score(batch, hidden, place.entry, passed)
                    progress(len(batch))

    @contextlib.contextmanager
    def _at(self, place: SweptPlace) -> Iterator[None]:
        with _without_warnings():  # `taking_organs` has shown them
            self.model.load_donor(self.donor, self.name, position=place.position, mode=place.mode)
        try:
            yield
        finally:
            self.model.delete_donor(self.name)

    @torch.no_grad()
    def _startable(self, entries: Iterable[int]) -> set[int]:
        """Return those layers at which the model, without the organ, can start: the pass then equals a whole one."""
        if self.forward is None:
            return set()
        inputs: dict[str, Any] = {"input_ids": torch.arange(4, device=input_device(self.model))[None]}
        inputs["use_cache"] = False
        with self.forward.capturing(entries) as found:
            whole = self.model(**inputs).logits  # (batch=1, seq=4, vocab)
        startable = set()
        for entry, hidden in found.items():
            with contextlib.suppress(AssertionError, LookupError), self.forward.running_from(entry, hidden):
                torch.testing.assert_close(self.model(**inputs).logits, whole)
                startable.add(entry)
        if others := sorted(found.keys() - startable):
            logger.warning("the model cannot start at layers %s: it is run whole for them", others)
        return startable

    @torch.no_grad()
    def _score(
        self, batch: list[Window], held: dict[int, torch.Tensor], entry: int | None, passed: Iterable[int]
    ) -> list[float]:
        """Score a batch from the entry on, if its hidden states are held; else whole, holding those at `passed`."""
        if self.forward is None:
            return nll_of(self.model, self.texts, batch)
        if entry in held:
            with self.forward.running_from(entry, held[entry]):
                return nll_of(self.model, self.texts, batch)
        with self.forward.capturing(passed) as found:
            sums = nll_of(self.model, self.texts, batch)
        held.update(found)
        return sums


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    package = logging.getLogger("not_hf")
    level = package.level
    package.setLevel(logging.ERROR)
    try:
        yield
    finally:
        package.setLevel(level)


def require_same(before: NDArray[np.float64], now: Sequence[float]) -> None:
    """Check that what was measured before, if anything, is measured again."""
    known = ~np.isnan(before)
    if not np.allclose(before[known], np.asarray(now)[known], rtol=1e-3, atol=1e-3):
        raise NotHFError("the folder holds the sweep of another model, whose perplexity differs; use another folder")
