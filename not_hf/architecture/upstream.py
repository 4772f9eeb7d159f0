"""Every private name of transformers, accelerate, DeepSpeed and torch that not_hf relies on.

Read this file against their changelogs when one of them releases: nothing else in the package calls or sets a private
name of theirs. Three kinds stay elsewhere: methods that a subclass overrides (`_from_config`, `_apply`), config keys,
which are data (`tables.py`), and what differs between releases (`releases.py`).
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
import types
from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks, _IncompatibleKeys
from torch.nn.utils.stateless import _reparametrize_module
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.integrations import deepspeed
from transformers.quantizers.base import HfQuantizer
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from not_hf.architecture.releases import pinned_file_kwargs, resolve_revision
from not_hf.errors import require_plain_token

# ------------------------------------------------------------------ calls of `from_pretrained`

# What the Auto classes and pipelines add to a user's keyword arguments, for the repo that was named first.
AUTO_KWARGS = ("_from_auto", "_from_pipeline", "_commit_hash", "adapter_kwargs")
ADAPTER = "_adapter_model_path"  # in `adapter_kwargs`: the adapter that was named, whose config names the donor
# How a repo, and a folder in it, is reached.
HUB_KWARGS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "subfolder", "token")
# What of it holds for several repos: a revision and a subfolder are one repo's own.
SHARED_KWARGS = tuple(key for key in HUB_KWARGS if key not in ("revision", "subfolder"))


def require_known(kwargs: Collection[str], known: Collection[str] = SHARED_KWARGS) -> None:
    """Check the keyword arguments that say how a repo is reached.

    Raises:
        TypeError: Naming those that are not known.
    """
    if unknown := sorted(set(kwargs) - set(known)):
        raise TypeError(f"unexpected arguments: {', '.join(unknown)}; expected are {', '.join(known)}")


def resolve_commit(source: str, hub_kwargs: Mapping[str, Any]) -> str | None:
    """Pin a revision to its commit, so that everything read from the repo is of one state.

    Raises:
        NotHFError: The token has characters that no token has.
    """
    require_plain_token(hub_kwargs.get("token"))
    return resolve_revision(
        source,
        hub_kwargs.get("revision"),
        token=hub_kwargs.get("token"),
        local_files_only=hub_kwargs.get("local_files_only", False),
        cache_dir=hub_kwargs.get("cache_dir"),
    )


def commit_of(revision: str | None) -> str | None:
    """The commit of a revision that `resolve_commit` has resolved, `None` for any other."""
    return getattr(revision, "resolved", None)


def fetch_file(source: str | os.PathLike[str], file: str, **hub_kwargs: Any) -> str | None:
    """Local path of a file in a folder or, once fetched, of one on the Hub; `None` when there is none of that name."""
    pinned = pinned_file_kwargs(hub_kwargs.get("revision"))
    return cached_file(source, file, _raise_exceptions_for_missing_entries=False, **pinned, **hub_kwargs)


# ------------------------------------------------------------------ building and loading models

BUILDING = threading.RLock()  # the settings of `built_whole` are global to all threads


@contextlib.contextmanager
def built_whole(hollow: bool = False) -> Iterator[None]:
    """Models built inside the block are whole on each process, also where transformers would partition them at once.

    DeepSpeed ZeRO-3 partitions them when training begins; until then organs can be checked and put in.

    Args:
        hollow: Do not initialize parameters: they are on the meta device, or filled afterwards.
    """
    with BUILDING:
        reference: Any = deepspeed._hf_deepspeed_config_weak_ref
        config = None if reference is None else reference()
        deepspeed.unset_hf_deepspeed_config()
        try:
            with no_init_weights() if hollow else contextlib.nullcontext():
                yield
        finally:
            if config is not None:
                deepspeed.set_hf_deepspeed_config(config)


@contextlib.contextmanager
def without_load_report() -> Iterator[None]:
    """Suppress the table of missing and unexpected tensors that transformers logs as a warning after loading."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


@contextlib.contextmanager
def without_progress_bar() -> Iterator[None]:
    """Suppress transformers' bar "Loading weights", where nothing is loaded."""
    before = transformers_logging._tqdm_active
    transformers_logging._tqdm_active = False
    try:
        yield
    finally:
        transformers_logging._tqdm_active = before


IncompatibleKeys = _IncompatibleKeys  # what `nn.Module.load_state_dict` returns
traced_parameters = _reparametrize_module  # does what `replaced_parameters` does, where torch.compile traces it


# ------------------------------------------------------------------ what a model is


def native_classes(auto_class: Any, config: PreTrainedConfig) -> tuple[type[PreTrainedModel], ...]:
    """The classes that an Auto class has for a config; none if the config's class is not in its table."""
    found = auto_class._model_mapping.get(type(config), ())
    return tuple(found) if isinstance(found, tuple | list) else (found,)


def carries_states(model: PreTrainedModel) -> bool:
    """Whether layers of a model carry a state from token to token, beside or instead of keys and values."""
    return bool(getattr(model, "_is_stateful", False))


def is_partitioned(module: nn.Module) -> bool:
    """Whether DeepSpeed ZeRO-3 has partitioned a module: its parameters are empty, their values on all processes."""
    return any(hasattr(parameter, "ds_id") for parameter in module.parameters())


def can_dequantize(quantizer: HfQuantizer | None) -> bool:
    """Whether `model.dequantize()` of transformers undoes what a quantizer did."""
    return quantizer is not None and type(quantizer)._dequantize is not HfQuantizer._dequantize


# Attributes that libraries set on modules begin with one of these; they say nothing about what a module computes.
BOOKKEEPING = ("_attn_implementation", "_is_hf", "_output_capturing", "_version", "call_super_init", "dump_patches")


# ------------------------------------------------------------------ attention


def attention_of(config: PreTrainedConfig) -> str | None:
    """The attention implementation that a config names; `None` until a model of it is built."""
    return config._attn_implementation


def set_attention(config: PreTrainedConfig, implementation: str | None) -> None:
    """Have a config name an attention implementation."""
    config._attn_implementation = implementation


def implementations(config: PreTrainedConfig) -> dict[str, str]:
    """The implementations that a config names, as keyword arguments of `from_pretrained`."""
    named = {
        "attn_implementation": config._attn_implementation,
        "experts_implementation": config._experts_implementation,
    }
    return {key: value for key, value in named.items() if value is not None}


# ------------------------------------------------------------------ modules that enter, leave or change


def set_layers(stack: nn.ModuleList, layers: Iterable[nn.Module]) -> None:
    """Make `layers` the content of a list, in one assignment that cannot fail halfway."""
    stack._modules = {str(n): layer for n, layer in enumerate(layers)}


@contextlib.contextmanager
def swapped_layers(stack: nn.ModuleList, layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have a list hold other layers inside the block."""
    before = stack._modules
    set_layers(stack, layers)
    try:
        yield
    finally:
        stack._modules = before


def view_with_layers(model: nn.Module, path: str, layers: Iterable[nn.Module]) -> nn.Module:
    """A model that shares all modules with another, but has other layers in the list at `path`.

    It has the `forward` of its class: one that accelerate has set, or a compiled one, belongs to the other model.
    """
    view = model.__new__(type(model))
    others = ("forward", "_compiled_call_impl")
    view.__dict__ = {key: value for key, value in vars(model).items() if key not in others}
    view._modules = dict(model._modules)
    name, _, rest = path.partition(".")
    inner: Any = model._modules[name]
    view._modules[name] = view_with_layers(inner, rest, layers) if rest else nn.ModuleList(layers)
    return view


def parameters_in(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield parameters by each of their names; those of a replica of `DataParallel`, too, which are plain tensors."""
    for path, each in module.named_modules():
        for key, tensor in (each._parameters | getattr(each, "_former_parameters", {})).items():
            if tensor is not None:
                yield f"{path}.{key}" if path else key, tensor


@contextlib.contextmanager
def replaced_parameters(module: nn.Module, values: Mapping[str, torch.Tensor]) -> Iterator[None]:
    """Have a module hold other tensors, by name, inside the block; Ctrl-C leaves it the parameters that it had."""
    owners = [(module.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in values]
    places = [(own._parameters if key in own._parameters else vars(own), key) for own, key in owners]
    before = [table[key] for table, key in places]

    def put(tensors: Iterable[Any]) -> None:
        for (table, key), tensor in zip(places, tensors, strict=True):
            table[key] = tensor

    try:
        try:
            put(values.values())
            yield
        finally:
            put(before)
    finally:  # again, if Ctrl-C came in between
        put(before)


def rebind_forward(module: nn.Module) -> None:
    """Have accelerate's hook on a module call the `forward` of its class, which has changed."""
    if "_old_forward" in vars(module):
        vars(module)["_old_forward"] = types.MethodType(type(module).forward, module)


def tables_of(module: nn.Module) -> list[dict[str, Any]]:
    """The dicts in which torch keeps a module's children, parameters and buffers."""
    return [module._modules, module._parameters, module._buffers]


def copy_checkpointing(layer: nn.Module, reference: Mapping[str, nn.Module]) -> None:
    """Have a layer use gradient checkpointing as another one does, whose modules are given by name."""
    for name, module in layer.named_modules():
        neighbour = vars(reference.get(name, module))
        for key in ("gradient_checkpointing", "_gradient_checkpointing_func"):
            if key in neighbour:
                setattr(module, key, neighbour[key])
            else:
                vars(module).pop(key, None)


def tensor_state(tensor: torch.Tensor) -> tuple[int, int, int]:
    """Identity, address and number of changes in place of a tensor; while it exists, no change leaves all three."""
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


# Hooks of transformers and PEFT that record what passes through, or set a flag.
_INERT_HOOKS = ("output_capturing_hook", "make_inputs_require_grads", "make_inputs_require_grad")


def foreign_hooks(module: nn.Module, before_only: bool = False, keeps_forward: bool = True) -> list[str]:
    """Names of what was attached to a module and may change what it computes.

    accelerate's hooks, which move tensors between devices, are left out.

    Args:
        module: The module.
        before_only: Leave out hooks that run after it.
        keeps_forward: Whether another `forward` than its class's counts.
    """
    own = vars(module)
    if not (own["_forward_pre_hooks"] or own["_forward_hooks"] or "forward" in own):
        return []
    hooks = list(own["_forward_pre_hooks"].values()) + ([] if before_only else list(own["_forward_hooks"].values()))
    found = [hook for hook in hooks if getattr(hook, "__name__", "") not in _INERT_HOOKS]
    if "_hf_hook" in own:
        found += [hook for hook in _flat(own["_hf_hook"]) if type(hook).__module__ != "accelerate.hooks"]
    forward = own.get("_old_forward" if "_hf_hook" in own else "forward") if keeps_forward else None
    if forward is not None and getattr(forward, "__func__", None) is not type(module).forward:
        found.append(forward)
    return [_name_of(hook) for hook in found]


def global_hooks() -> list[str]:
    """Names of the hooks that run before or after every module of the process."""
    return [_name_of(hook) for hook in (*_global_forward_pre_hooks.values(), *_global_forward_hooks.values())]


def _name_of(hook: Any) -> str:
    return str(getattr(hook, "__qualname__", type(hook).__qualname__))


def _flat(hook: Any) -> list[Any]:
    """The hooks that one of accelerate's consists of."""
    return [each for part in hook.hooks for each in _flat(part)] if hasattr(hook, "hooks") else [hook]


def forget_capture_hooks(model: nn.Module, path: str, entering: Iterable[nn.Module]) -> None:
    """Remove the hooks that record hidden states and attentions; transformers installs them anew when it needs them.

    It does so once per model, for the layers that the model has then.

    Args:
        model: A model.
        path: Path of its list of layers; the models along it may have had hooks installed.
        entering: Layers of other models that are to enter the list.
    """
    parts = path.split(".")
    models = [model, *(model.get_submodule(".".join(parts[: n + 1])) for n in range(len(parts)))]
    roots = list(entering)
    for each in models:
        if vars(each).pop("_output_capturing_hooks_installed", False):
            roots.append(each)
    for module in (module for root in roots for module in root.modules()):
        for key, hook in list(module._forward_hooks.items()):
            if getattr(hook, "__name__", "") == "output_capturing_hook":
                del module._forward_hooks[key]


# ------------------------------------------------------------------ models that accelerate dispatched


def dispatch_hooks(module: nn.Module) -> list[Any]:
    """accelerate's hooks of a module and of all modules in it."""
    return [hook for each in module.modules() if (hook := getattr(each, "_hf_hook", None)) is not None]


def keys_left_in_place(model: PreTrainedModel) -> Any:
    """Names of the arguments that accelerate does not move between devices, such as the cache."""
    return getattr(model, "_skip_keys_device_placement", None)
