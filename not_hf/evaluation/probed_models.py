"""The models of a privacy probe: an organ in its recipient and in others, or a model as it is given."""

from __future__ import annotations

import contextlib
import copy
import functools
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.stack import find_stack
from not_hf.config import DonorConfig
from not_hf.donor.compatibility import check_compatibility
from not_hf.donor.modeling import DonorModel
from not_hf.donor.tokenizer import lacks_tokens
from not_hf.errors import IncompatibleDonorError, NotHFError
from not_hf.evaluation.compared_methods import public_name
from not_hf.evaluation.perplexity import load_model, load_tokenizer
from not_hf.evaluation.windows import context_of
from not_hf.recipient.heads import class_of, recipient_config
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.new_tokens import require_tokens

Source = PreTrainedModel | str | os.PathLike[str]
Opened = Callable[[], contextlib.AbstractContextManager[Any]]  # yields the model, ready to be run

AS_GIVEN, OWN, RANDOM = "as given", "its own", "random layers"  # recipients


def donor_of(model: Source | DonorModel) -> DonorModel | None:
    """Return the donor, loaded if given by name; `None` if it is another model, or a composition."""
    if isinstance(model, nn.Module):
        return model if isinstance(model, DonorModel) else None
    source = os.fspath(model)
    config = AutoConfig.from_pretrained(source, trust_remote_code=False)
    is_donor = isinstance(config, DonorConfig) and config.donors is None
    return DonorModel.from_pretrained(source) if is_donor else None


def probed_models(
    model: Source,
    donor: DonorModel | None,
    base: Source | None,
    recipients: Mapping[str, Source],
    with_random_layers: bool,
    seed: int,
) -> dict[str, Opened]:
    """Return what opens each model, by its recipient; the first one is what is probed first of all.

    Args:
        model: As for `probe_privacy`, like `base`, `recipients`, `with_random_layers` and `seed`.
        donor: What `donor_of` returns of it.

    Raises:
        IncompatibleDonorError: The donor does not fit a recipient.
        NotHFError: `recipients` is no dict; a recipient is given for another model than a donor, has organs, or is
            named as ours are; or there is none.
    """
    if donor is None:
        if base is not None or recipients or with_random_layers:
            raise NotHFError(
                "base, recipients and with_random_layers say where to put an organ; give the donor as model: its "
                "folder, Hub ID or DonorModel"
            )
        return {AS_GIVEN: lambda: contextlib.nullcontext(load_causal(model))}
    given: Any = recipients
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise NotHFError(f"recipients must be a dict, got a {kind}; give recipients={{'what it is': model}}")
    if taken := recipients.keys() & {OWN, RANDOM}:
        raise NotHFError(f"recipients may not be named {', '.join(map(repr, sorted(taken)))}; choose other names")
    base, where = _own_recipient(donor, base)
    found: dict[str, Opened] = {OWN: functools.partial(_transplanted, donor, base, where)}
    for name, recipient in recipients.items():
        found[name] = functools.partial(_transplanted, donor, recipient, {})
    for name, recipient in {OWN: base, **recipients}.items():
        _require_fit(donor, name, recipient, where if name == OWN else {})
    if with_random_layers:
        found[RANDOM] = functools.partial(_transplanted, donor, base, where, seed)
    return found


def shortest_context(
    model: Source,
    donor: DonorModel | None,
    base: Source | None,
    recipients: Mapping[str, Source],
    reference: Source | None,
) -> float:
    """Return how many tokens all models of a probe can read at once; the arguments are those of `probed_models`."""
    others = [model] if donor is None else [*recipients.values()]
    others += [] if reference is None else [reference]
    places: list[tuple[Source, dict[str, Any]]] = [(each, {}) for each in others] + (
        [] if donor is None else [_own_recipient(donor, base)]
    )
    return min(context_of(recipient_config(source, **where)) for source, where in places)


def load_causal(source: Source, where: Mapping[str, Any] | None = None) -> PreTrainedModel:
    """Load a model, unless it is a live one, and check that it is a causal LM."""
    return load_model(source if isinstance(source, nn.Module) else os.fspath(source), **(where or {}))


def tokenizer_of(
    model: Source | DonorModel,
    donor: DonorModel | None,
    base: Source | None,
    reference: Source | None,
    tokenizer: PreTrainedTokenizerBase | str | None,
) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a probe: by default that of the recipient, or the donor's if it brings tokens.

    Raises:
        NotHFError: A live model has none, it lacks tokens of the donor, or that of the reference has other ids.
    """
    source, where = (model if base is None or isinstance(base, nn.Module) else base), dict[str, Any]()
    if isinstance(source, DonorModel) and source.config.base_model_name_or_path:
        source, where = _own_recipient(source, None)
    found = load_tokenizer(source if isinstance(source, nn.Module) else os.fspath(source), tokenizer, **where)
    if donor is not None:
        if tokenizer is None and donor.name_or_path and lacks_tokens(found, donor.config):
            found = AutoTokenizer.from_pretrained(donor.name_or_path)
        require_tokens(found, donor.config)
    if reference is not None and not isinstance(reference, nn.Module):
        own, other = found.get_vocab(), _vocabulary(os.fspath(reference))
        if any(other.get(token, number) != number for token, number in own.items()):
            raise NotHFError(f"{reference} reads other token ids; give a reference with the tokenizer of the model")
    return found


def name_of(model: Source) -> str | None:
    """Return the Hub ID or folder of a model, if it has one, as it may be published."""
    name = getattr(model, "name_or_path", None) if isinstance(model, nn.Module) else os.fspath(model)
    return public_name(name) if name else None


def _vocabulary(name: str) -> dict[str, int]:
    """Return the token ids of a model by name; none, if it has no tokenizer."""
    try:
        return AutoTokenizer.from_pretrained(name).get_vocab()
    except (OSError, ValueError):
        return {}


def _own_recipient(donor: DonorModel, base: Source | None) -> tuple[Source, dict[str, Any]]:
    """Return the recipient of a donor, default the base that it names, and where that is."""
    if base is not None:
        return base, {}
    if donor.config.base_model_name_or_path is None:
        raise NotHFError("the donor names no base; pass base=, its recipient")
    where = {"revision": donor.config.base_revision, "subfolder": donor.config.base_subfolder or ""}
    return donor.config.base_model_name_or_path, where


def _require_fit(donor: DonorModel, name: str, recipient: Source, where: Mapping[str, Any]) -> None:
    if isinstance(recipient, Recipient):
        raise NotHFError(f"the recipient {name!r} has organs; give the model without them (unload)")
    if isinstance(recipient, nn.Module):
        config = recipient.config
    else:
        config = AutoConfig.from_pretrained(os.fspath(recipient), trust_remote_code=False, **where)
    if isinstance(config, DonorConfig):
        raise NotHFError(f"the recipient {name!r} is a donor; give a model without organs")
    if problems := check_compatibility(donor, config):
        raise IncompatibleDonorError(f"recipient {name!r}: {'; '.join(problems)}")


@contextlib.contextmanager
def _transplanted(
    donor: DonorModel, base: Source, where: Mapping[str, Any], random_seed: int | None = None
) -> Iterator[Any]:
    """Have a recipient hold the organ inside the block; its other layers get random weights if there is a seed."""
    model = load_causal(base, where)
    if random_seed is not None:
        model = copy.deepcopy(model) if model is base else model
        _randomize_layers(model, random_seed)
    recipient: Any = class_of(model).from_pretrained(model, donor)
    try:
        yield recipient
    finally:
        recipient.unload()


def _randomize_layers(model: PreTrainedModel, seed: int) -> None:
    """Give the layers of a model the weights that they would have before any training; nothing else is changed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        fresh = type(model)(copy.deepcopy(model.config))
    find_stack(model).layers.load_state_dict(find_stack(fresh).layers.state_dict())
