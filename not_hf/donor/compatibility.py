"""`check_compatibility`: whether a donor fits a recipient, from configs alone, with all mismatches at once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel

from not_hf.architecture.differences import LayerDescription, computing_differences
from not_hf.architecture.part_names import ALL
from not_hf.architecture.releases import overridden_keys, values_of_layer
from not_hf.architecture.splicing import moved_features, place_bound, require_counted, spliced_config
from not_hf.architecture.stack import layers_config
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import require_known, resolve_commit
from not_hf.config import DonorConfig, OrganSpec
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import module_problems, sharing_differences
from not_hf.donor.vocabulary import Repo, vocabulary_differences
from not_hf.errors import NotHFError, UnsupportedArchitectureError, printable, reading_repo

# Values that the recipient uses for all its layers at once or for its caches: an organ must have the same.
SHARED_GEOMETRY = (
    "is_decoder",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "global_head_dim",  # older releases; newer ones give layers values of their own
    "rope_parameters",
    "rotary_dim",
    "alibi",
    "window_size",
)

DonorLike = str | os.PathLike[str] | DonorConfig | DonorModel
RecipientLike = str | os.PathLike[str] | PreTrainedConfig | PreTrainedModel


class Mismatches(list[str]):
    """Reasons why a donor does not fit a recipient, one line each; empty if it fits.

    Args:
        problems: These lines.
        differences: Other differences between the donor's base and the recipient, with which the organ can run.
    """

    def __init__(self, problems: Iterable[str] = (), differences: Iterable[str] = ()) -> None:
        super().__init__(map(_line, problems))
        self.differences = list(map(_line, differences))


def _line(problem: str) -> str:
    """One line of at most 1,000 characters, whatever names a donor has for its tensors."""
    return printable(" ".join(problem.split()))[:1000]


def check_compatibility(
    donor: DonorLike,
    recipient: RecipientLike,
    position: int | None = None,
    mode: str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    **hub_kwargs: Any,
) -> Mismatches:
    """List all reasons why a donor does not fit a recipient, from configs alone.

    Args:
        donor: Donor model, config, folder or Hub ID.
        recipient: Recipient model, native config, folder or Hub ID.
        position: Position among the recipient's own layers; default: the donor's.
        mode: `"insert"` or `"replace"`; default: the donor's.
        revision: Branch, tag or commit of the donor's repo.
        subfolder: Folder of the donor within its repo.
        **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only` for both repos.

    Returns:
        One line per mismatch, none if the organ fits. If only the position is wrong, the line names those that fit. If
        the organ fits, the list's `differences` name the rest: another base, other config values, another vocabulary.

    Raises:
        CorruptDonorError: The donor's config is invalid.
        NotHFError: The recipient is a donor, or a donor in memory is given a revision or subfolder.
        OSError: A config cannot be read.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel, check_compatibility
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> donor = DonorModel.from_base(base, layers=(1, 3))
        >>> check_compatibility(donor, base)
        []
        >>> check_compatibility(donor, GPT2Config(vocab_size=9, n_embd=16, n_layer=4, n_head=2))
        ['donor hidden_size 8 does not fit recipient hidden_size 16 (the recipient); choose a recipient ...']
    """
    require_known(hub_kwargs)
    donor_config = _donor_config(donor, revision, subfolder, hub_kwargs)
    whole = whole_config(recipient, hub_kwargs)
    spec, config = donor_config.check(), layers_config(whole)
    place = (donor_config.position if position is None else position, mode or donor_config.mode)
    live: Any = recipient if isinstance(recipient, PreTrainedModel) else whole
    if problems := mismatches(spec, config, *place) or module_problems(donor_config, live):
        return Mismatches(problems)
    differences = recipient_differences(spec, config, hub_kwargs.get("cache_dir"))
    differences += moved_features(getattr(live, "config", live), *place)
    return Mismatches((), differences + layer_type_differences(spec, config, *place))


def mismatches(
    spec: OrganSpec, recipient: PreTrainedConfig, position: Any, mode: str, in_stack: bool = False
) -> list[str]:
    """List all reasons why an organ does not fit at a place in a recipient, given its config without organs.

    With `in_stack`, the structure of an organ is checked only if there are other problems: `describe_stack` does it.
    """
    misplaced = _place_problems(spec, recipient, position, mode)
    if spec.config.modules != ALL and not misplaced:
        misplaced = _parts_problems(spec, recipient, position, mode)
    problems = _config_mismatches(spec, recipient) + misplaced
    if problems:
        try:
            _ = meta_twin(recipient).stack
        except UnsupportedArchitectureError as error:
            return [f"{name_of(recipient)}: {error}", *problems]
    if spec.organ.model_type == recipient.model_type and not misplaced and (problems or not in_stack):
        problems += structure_problems(spec, recipient, int(position), mode)
    return problems


def _config_mismatches(spec: OrganSpec, recipient: PreTrainedConfig) -> list[str]:
    """List the config values that must be equal and are not."""
    organ, name = spec.organ, name_of(recipient)
    problems = []
    if organ.model_type != recipient.model_type:
        problems.append(_mismatch("model_type", organ.model_type, recipient.model_type, name))
    for key in SHARED_GEOMETRY:
        if (pair := _differing_values(organ, recipient, key)) is not None:
            problems.append(_mismatch(key, *pair, name))
    return problems + _layer_type_problems(organ, recipient, name)


def describe_stack(
    origins: Sequence[tuple[OrganSpec | None, int]], recipient: PreTrainedConfig
) -> tuple[list[LayerDescription], list[LayerDescription]]:
    """Describe the layers of a stack as built in their own models, and as built in a native model of that stack.

    Args:
        origins: For each layer, its organ (`None` for the recipient) and its index in that.
        recipient: Native config of the recipient without organs.

    Raises:
        UnsupportedArchitectureError: No native model can be built of such a stack.
    """
    spliced = spliced_config(recipient, [(spec.organ if spec else recipient, n) for spec, n in origins])
    require_counted(recipient, spliced)
    native = meta_twin(spliced).descriptions
    specs = {id(spec): spec for spec, _ in origins if spec is not None}
    organs = {key: meta_twin(spec.base).descriptions[slice(*spec.config.span)] for key, spec in specs.items()}
    own = meta_twin(recipient).descriptions
    return [(own if spec is None else organs[id(spec)])[n] for spec, n in origins], native


def unmatched_tensors(built: Sequence[LayerDescription], native: Sequence[LayerDescription]) -> set[str]:
    """Name the tensors that only one of the two sides of `describe_stack` has.

    The recipient's own layers are compared too: if its first layers are special, no others can be before them.
    """

    def tensors(layer: LayerDescription) -> set[str]:  # with shapes, since buffers must be long enough
        return layer.parameters.keys() | {f"{name} {shape}" for name, shape in layer.buffers.items()}

    return {
        name
        for ours, theirs in zip(built, native, strict=True)
        if ours is not theirs
        for name in tensors(ours) ^ tensors(theirs)
    }


def recipient_differences(
    spec: OrganSpec, recipient: PreTrainedConfig, cache_dir: str | os.PathLike[str] | None = None
) -> list[str]:
    """List the differences between a donor's base and a recipient with which the organ can run.

    Tokenizers are compared only if they are in the Hub cache (`cache_dir`) or on disk.
    """
    base, name = spec.config.base_model_name_or_path, recipient.name_or_path
    differences = [f"the organ was last used in {base}, not in {name}"] if base and name and base != name else []
    if spec.base.model_type == recipient.model_type:
        differences += [
            f"{key} is {theirs!r} in the recipient, {ours!r} in the base"
            for key, ours, theirs in computing_differences(spec.base, recipient)
        ]
        differences += sharing_differences(spec.config, spec.base, recipient)
    return differences + vocabulary_differences(spec, recipient, recipient_repo=Repo(name), cache_dir=cache_dir)


def layer_type_differences(spec: OrganSpec, recipient: PreTrainedConfig, position: Any, mode: str) -> list[str]:
    """Compare the attention of an organ's layers (sliding, full, …) with that of the layers they replace."""
    ours, theirs = (list(getattr(config, "layer_types", None) or ()) for config in (spec.organ, recipient))
    replaced = theirs[position : position + len(ours)]
    if mode != "replace" or not theirs or ours == replaced:
        return []
    return [f"layer_types of the organ are {', '.join(ours)}; in their place the recipient has {', '.join(replaced)}"]


def name_of(recipient: PreTrainedConfig) -> str:
    """Name a recipient in messages."""
    return recipient.name_or_path or "the recipient"


def _differing_values(organ: PreTrainedConfig, recipient: PreTrainedConfig, key: str) -> tuple[Any, Any] | None:
    """Return the values of a key in two configs if they differ.

    Where layers have values of their own, those of layers of one type are compared, if both configs have that type.
    """
    if not any(key in (overridden_keys(config) or ()) for config in (organ, recipient)):
        ours, theirs = (getattr(config, key, None) for config in (organ, recipient))
        return (ours, theirs) if ours != theirs else None
    for kind, value in _by_layer(organ, key):
        there = [theirs for other, theirs in _by_layer(recipient, key) if other == kind]
        if there and value not in there:
            return value, there[0]
    return None


def _by_layer(config: PreTrainedConfig, key: str) -> list[tuple[str | None, Any]]:
    """Return the type of each layer, and the value of a key there."""
    types = getattr(config, "layer_types", None) or [None] * config.num_hidden_layers
    return [(kind, values_of_layer(config, n, [key])[key]) for n, kind in enumerate(types)]


def _mismatch(key: str, ours: Any, theirs: Any, name: str) -> str:
    return f"donor {key} {ours} does not fit recipient {key} {theirs} ({name}); choose a recipient with {key} {ours}"


def _layer_type_problems(organ: PreTrainedConfig, config: PreTrainedConfig, name: str) -> list[str]:
    """List layer types of the organ for which the recipient has no mask or no rotary embedding."""
    types = set(getattr(organ, "layer_types", None) or ())
    problems = []
    windowed = types & {"sliding_attention", "chunked_attention"} or not types
    if windowed and (pair := _differing_values(organ, config, "sliding_window")) is not None:
        problems.append(_mismatch("sliding_window", *pair, name))
    rotary = getattr(config, "rope_parameters", None) or {}
    served = set(getattr(config, "layer_types", None) or ())
    if any(isinstance(value, dict) for value in rotary.values()) and types - served:  # one embedding per layer type
        problems.append(
            f"donor layer_types {sorted(types - served)} have no rotary embedding in {name}; "
            f"cut layers of type {sorted(served)}"
        )
    return problems


def structure_problems(spec: OrganSpec, recipient: PreTrainedConfig, position: int, mode: str) -> list[str]:
    """Check whether a native model would have other modules at a place than the organ; names places that fit."""
    k, name = spec.config.num_organ_layers, name_of(recipient)

    def problem_at(position: int) -> str | None:
        rest = position + (k if mode == "replace" else 0)
        stack: list[tuple[OrganSpec | None, int]] = [(None, n) for n in range(recipient.num_hidden_layers)]
        stack[position:rest] = [(spec, n) for n in range(k)]
        try:
            found = unmatched_tensors(*describe_stack(stack, recipient))
        except UnsupportedArchitectureError as error:
            return f"{name} cannot take these layers ({error})"
        if not found:
            return None
        others = ", ".join(sorted(found)[:4])
        return f"layers of {name} have other modules than the donor's ({others}, …)"

    if (problem := problem_at(position)) is None:
        return []
    if fitting := [n for n in range(_last_position(k, mode, recipient) + 1) if n != position and not problem_at(n)]:
        return [f"{problem} at position {position}; fitting positions: {', '.join(map(str, fitting))}"]
    return [f"{problem} at every position; cut a donor of layers like the recipient's"]


def _place_problems(spec: OrganSpec, config: PreTrainedConfig, position: Any, mode: str) -> list[str]:
    """Check position and mode of an organ in a recipient."""
    k, name, num_layers = spec.config.num_organ_layers, name_of(config), getattr(config, "num_hidden_layers", None)
    if num_layers is None:
        return []
    if mode not in ("insert", "replace"):
        return [f"mode must be 'insert' or 'replace', got {mode!r}"]
    last = _last_position(k, mode, config)
    if not hasattr(position, "__index__") or not 0 <= position <= last:
        room = f"position must be between 0 and {last}" if last >= 0 else "the organ is longer than the recipient"
        return [f"cannot {mode} {k} layers at position {position} of {num_layers} ({name}); {room}"]
    if (key := place_bound(spec.base)) and (mode, position) != ("replace", spec.config.span[0]):
        return [
            f"cannot {mode} {k} layers at position {position} ({name}): they have inputs of their own ({key}), and "
            f"can only be replaced in their place; use mode='replace' and position={spec.config.span[0]}"
        ]
    return []


def _parts_problems(spec: OrganSpec, recipient: PreTrainedConfig, position: int, mode: str) -> list[str]:
    """Check that parts of layers come into layers of the same kind."""
    if mode != "replace":
        return [f"the donor holds parts of layers (modules={spec.config.modules!r}); use mode='replace'"]
    return layer_type_differences(spec, recipient, position, mode)


def _last_position(k: int, mode: str, config: PreTrainedConfig) -> int:
    return config.num_hidden_layers if mode == "insert" else config.num_hidden_layers - k


def _donor_config(
    donor: DonorLike, revision: str | None, subfolder: str | None, hub_kwargs: Mapping[str, Any]
) -> DonorConfig:
    if isinstance(donor, DonorConfig | DonorModel):
        require_no_repo(revision, subfolder)
        return donor if isinstance(donor, DonorConfig) else donor.config
    if isinstance(donor, PreTrainedModel):
        raise NotHFError(f"the donor is a {type(donor).__name__}, not a DonorModel; name the donor first")
    return DonorConfig.from_pretrained(os.fspath(donor), revision=revision, subfolder=subfolder or "", **hub_kwargs)


def require_no_repo(revision: str | None, subfolder: str | None) -> None:
    """Check that a donor in memory is given no place in a repo."""
    if revision or subfolder:
        raise NotHFError("a donor in memory has no revision or subfolder; leave them out, or give its folder or ID")


def whole_config(recipient: RecipientLike, hub_kwargs: Mapping[str, Any]) -> PreTrainedConfig:
    """Return the whole config of a recipient, live or by name, without organs.

    Raises:
        NotHFError: It is a donor.
        OSError: The config cannot be read.
    """
    config: Any = recipient
    if isinstance(recipient, PreTrainedModel):
        config = getattr(recipient, "base_config", recipient.config)
    elif not isinstance(recipient, PreTrainedConfig):
        name = os.fspath(recipient)
        with reading_repo(name):
            config = AutoConfig.from_pretrained(name, **{**hub_kwargs, "revision": resolve_commit(name, hub_kwargs)})
    if isinstance(config, DonorConfig):
        name = config.name_or_path or f"the {type(recipient).__name__}"
        raise NotHFError(f"{name} is a donor, not a recipient; name the donor first, then its base or another model")
    return config
