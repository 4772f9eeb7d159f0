"""Where a language model keeps its layers, and how a config changes when layers move.

What must be known about particular model types is data at the top of this file. `native_differences` checks it against
the live model: it rebuilds the model from its config on the meta device and compares the two layer by layer.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import hashlib
import json
import math
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)

from not_hf.errors import UnsupportedArchitectureError
from not_hf.zero3 import built_whole

# Config lists with one entry per layer. A whitelist: "any list of that length" would also match `eos_token_id`.
PER_LAYER_LISTS = (
    "layer_types",
    "mlp_layer_types",
    "attention_layers",
    "layer_rope_theta",
    "no_rope_layers",
    "num_attention_heads_per_layer",
    "layers_block_type",
    "block_types",
)
# Config lists that hold the indices of the layers that have a property.
LAYER_INDEX_LISTS = ("mlp_only_layers", "moe_layers")
# Config counts of the first layers, which are dense where the others have experts.
DENSE_PREFIXES = ("first_k_dense_replace", "num_dense_layers")
# Config rules that say which layers are special; a splice rewrites or overrules them.
PERIODS = (
    "attention_types",
    "decoder_sparse_step",
    "max_window_layers",
    "_sliding_window_pattern",
    "no_rope_layer_interval",
)
# Config keys that layers do not compute with.
LAYERLESS = {
    *("vocab_size", "tie_word_embeddings", "use_cache", "initializer_range", "max_position_embeddings", "n_positions"),
    *("output_hidden_states", "output_attentions", "return_dict", "pretraining_tp", "problem_type", "torch_dtype"),
    *("embedding_multiplier", "logits_scaling", "logit_scale", "final_logit_softcapping", "word_embed_proj_dim"),
}
# Attributes in which a layer, or a module in it, remembers its index.
INDEX_ATTRIBUTES = ("layer_idx", "layer_id", "layer_number")
# Modules (end of their path) and parameters (without `weight`/`bias`) by which a layer writes to the residual stream.
OUTPUT_PROJECTIONS = {
    "attention": ("o_proj", "out_proj", "c_proj", "dense", "wo", "Wo", "dense_attention"),
    "mlp": (
        *("down_proj", "c_proj", "fc2", "fc_out", "dense_4h_to_h", "w2", "down_proj_bias", "output_linear", "Wo"),
        "output.dense",  # of an encoder; its `intermediate.dense` goes the other way
    ),
}
# Config values that scale the embeddings before the first layer: an organ alone must run without them.
NEUTRAL_EMBEDDING = {"embedding_multiplier": 1.0}
# Config values that make layers depend on each other; an organ cannot be cut where they are set.
SHARED_STATE = ("num_kv_shared_layers",)

Slot = tuple[PreTrainedConfig, int]  # a layer's origin: the config of its own model and its index there


@dataclass(frozen=True)
class Stack:
    """Where a live model keeps its layers: `model.<base>.<path>` is their `ModuleList`."""

    model: nn.Module
    base: str  # the base model in the model with a head: model, transformer, bert, …
    path: str  # the list in the base model: layers, h, decoder.layers, …

    @property
    def full_path(self) -> str:
        """Path of the list from the model."""
        return f"{self.base}.{self.path}"

    @property
    def base_model(self) -> PreTrainedModel:
        """The native base model."""
        return cast(PreTrainedModel, self.model.get_submodule(self.base))

    @property
    def layers(self) -> nn.ModuleList:
        """The layers that stand in the stack now."""
        return cast(nn.ModuleList, self.model.get_submodule(self.full_path))


def find_stack(model: PreTrainedModel) -> Stack:
    """Find the one `ModuleList` whose length is `config.num_hidden_layers`.

    Raises:
        UnsupportedArchitectureError: With the reason why `model` cannot give or take layers.
    """
    config = model.config
    check_config(config)
    kind = f"model_type {config.model_type!r}"
    if getattr(model, "_is_stateful", False):
        raise UnsupportedArchitectureError(f"{kind} carries a recurrent state that has no place in a KV cache")
    num_layers = getattr(config, "num_hidden_layers", None)
    paths = [
        path
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    ]
    paths = [path for path in paths if not any(path.startswith(f"{outer}.") for outer in paths)]
    if len(paths) > 1:
        paths = [p for p in paths if isinstance(next(model.get_submodule(p).children()), GradientCheckpointingLayer)]
    if len(paths) != 1:
        found = "no list" if not paths else "several lists (" + ", ".join(paths) + ")"
        raise UnsupportedArchitectureError(f"{kind} has {found} of num_hidden_layers={num_layers} layers")
    parts = paths[0].split(".")
    for n in range(1, len(parts)):
        base = model.get_submodule(".".join(parts[:n]))
        if isinstance(base, PreTrainedModel):
            if base.config is not config:
                raise UnsupportedArchitectureError(f"{kind} has its layers under another config; load the text model")
            return Stack(model, ".".join(parts[:n]), ".".join(parts[n:]))
    raise UnsupportedArchitectureError(f"{kind} keeps its layers outside of a base model")


def check_config(config: PreTrainedConfig) -> None:
    """Refuse what a config alone shows to be impossible.

    Raises:
        UnsupportedArchitectureError: With the reason.
    """
    kind = f"model_type {config.model_type!r}"
    if config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{kind} is an encoder-decoder; use a decoder-only causal LM")
    if any(getattr(config, key, None) for key in SHARED_STATE):
        raise UnsupportedArchitectureError(f"{kind} shares keys and values between layers; they cannot be cut apart")
    if config.is_heterogeneous:
        raise UnsupportedArchitectureError(f"{kind} uses per_layer_config, which not_hf cannot splice yet")


def is_encoder(config: PreTrainedConfig) -> bool:
    """Whether a config stands for a masked LM, whose layers see both sides, and not for a causal one.

    A model type that transformers has both heads for (bert) says by `is_decoder` which of them it means.
    """
    if config.is_encoder_decoder or config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return False
    return config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or getattr(config, "is_decoder", None) is False


def head_class(config: PreTrainedConfig) -> Any:
    """The Auto class that gives a config its language-modelling head."""
    return AutoModelForMaskedLM if is_encoder(config) else AutoModelForCausalLM


def task_of(config: PreTrainedConfig) -> str:
    """The Hub's name for what a language model of this config does."""
    return "fill-mask" if is_encoder(config) else "text-generation"


@dataclass(frozen=True)
class Twin:
    """A native language model on the meta device, and what is asked of it more than once. Only to be looked at."""

    model: PreTrainedModel

    @functools.cached_property
    def layers(self) -> list[nn.Module]:
        """Those of its stack.

        Raises:
            UnsupportedArchitectureError: As in `find_stack`.
        """
        return list(self.stack.layers)

    @functools.cached_property
    def stack(self) -> Stack:
        """Where its layers are; raises as `find_stack` does."""
        return find_stack(self.model)

    @functools.cached_property
    def tensors(self) -> list[frozenset[str]]:
        """Of each layer: names of its parameters, names and shapes of its buffers, which must be long enough."""
        return [
            frozenset(name for name, _ in layer.named_parameters())
            | {f"{name} {tuple(buffer.shape)}" for name, buffer in layer.named_buffers()}
            for layer in self.layers
        ]


def meta_twin(config: PreTrainedConfig, model_class: type[PreTrainedModel] | None = None) -> Twin:
    """The native language model of `config` on the meta device: every attribute and shape, no memory.

    It is kept for the questions that are asked of it in a row.

    Raises:
        UnsupportedArchitectureError: transformers has no language model for this config, or cannot build it.
    """
    check_config(config)
    values = {key: value for key, value in config.to_dict().items() if key not in _NAMES}
    key = repr((type(config), config._attn_implementation or "sdpa", sorted(values.items())))
    twin = next((twin for k, twin in _twins if k == key and model_class in (None, type(twin.model))), None)
    if twin is None:
        config = copy.deepcopy(config)
        if isinstance(config.dtype, str):  # save_pretrained leaves it so, and some models compute with it
            config.dtype = getattr(torch, config.dtype)
        with built_whole(), no_init_weights(), torch.device("meta"):
            twin = Twin(build(model_class or head_class(config).from_config, config))
        _twins.append((key, twin))
    return twin


_twins: deque[tuple[str, Twin]] = deque(maxlen=4)  # the last ones, each by what its config says


def build(constructor: Callable[..., PreTrainedModel], config: PreTrainedConfig, **kwargs: Any) -> PreTrainedModel:
    """Call a native constructor; whatever it raises on a config it cannot serve becomes one typed line."""
    try:
        return constructor(config, **kwargs)
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        kind = "masked" if is_encoder(config) else "causal"
        raise UnsupportedArchitectureError(
            f"no {kind} LM can be built from model_type {config.model_type!r}: {reason}"
        ) from error


def splice_config(base: PreTrainedConfig, slots: Sequence[Slot]) -> dict[str, Any]:
    """The config values that change when a model of config `base` gets the layers `slots`, in order.

    Args:
        base: Config of the model that receives the layers; it is not changed.
        slots: For each layer of the new stack, where it comes from.

    Returns:
        New values by attribute name, for `num_hidden_layers` and every per-layer rule that `base` has.
    """
    values: dict[str, Any] = {"num_hidden_layers": len(slots)}
    for key in PER_LAYER_LISTS:
        if _is_list(base, key) and len(getattr(base, key)) == base.num_hidden_layers:
            values[key] = [getattr(config, key)[i] for config, i in slots]
    for key in LAYER_INDEX_LISTS:
        if _is_list(base, key):
            values[key] = [n for n, (config, i) in enumerate(slots) if i in getattr(config, key)]
    if "attention_layers" in values and _is_list(base, "attention_types"):  # gpt_neo writes the list run-length coded
        values["attention_types"] = [[list(values["attention_layers"]), 1]]
    if getattr(base, "decoder_sparse_step", None) is not None and "mlp_only_layers" in values:
        # layer i is sparse when step divides i + 1, unless listed: say the same with step 1 and the list alone
        values["mlp_only_layers"] = [
            n
            for n, (config, i) in enumerate(slots)
            if (i + 1) % (config.decoder_sparse_step or 1) or i in config.mlp_only_layers
        ]
        values["decoder_sparse_step"] = 1
    for key in DENSE_PREFIXES:
        if getattr(base, key, None) is not None:
            dense = [i < getattr(config, key) for config, i in slots]
            values[key] = dense.index(False) if False in dense else len(dense)
    return values


def spliced_config(base: PreTrainedConfig, slots: Sequence[Slot]) -> PreTrainedConfig:
    """A copy of `base` that describes the layers `slots`."""
    config = copy.deepcopy(base)
    for key, value in splice_config(base, slots).items():
        setattr(config, key, value)
    return config


def config_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    """What two configs say otherwise, beside names and dtypes."""
    mine, other = ours.to_dict(), theirs.to_dict()
    keys = sorted((mine.keys() | other.keys()) - _NAMES)
    odd = [key for key in keys if not _same(mine.get(key), other.get(key))]
    return [f"{key} is {mine.get(key)!r}, not {other.get(key)!r}" for key in odd]


def computing_differences(ours: PreTrainedConfig, theirs: PreTrainedConfig) -> list[str]:
    """The differences of two configs that may change what layers compute: some read the recipient's as they run."""
    spared = {"num_hidden_layers", *PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *DENSE_PREFIXES, *PERIODS, *LAYERLESS}
    spared |= {ours.attribute_map.get(key, key) for key in spared}

    def counts(key: str) -> bool:
        return key not in spared and "dropout" not in key and not key.endswith("_token_id")

    return [each for each in config_differences(ours, theirs) if counts(each.partition(" ")[0])]


def set_layer_index(layer: nn.Module, index: int) -> None:
    """Tell a layer and every module in it that it stands at `index` of the stack."""
    for module, name in _index_holders(layer):
        setattr(module, name, index)


@contextlib.contextmanager
def numbered(layers: Sequence[nn.Module]) -> Iterator[None]:
    """Number layers from 0 for a while."""
    before = [(module, name, vars(module)[name]) for layer in layers for module, name in _index_holders(layer)]
    try:
        for n, layer in enumerate(layers):
            set_layer_index(layer, n)
        yield
    finally:
        for module, name, value in before:
            setattr(module, name, value)


def output_projections(layer: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """The parameters through which `layer` writes to the residual stream, biases included, norms never.

    Yields:
        Name below the layer, and the parameter.
    """
    for name, parameter in layer.named_parameters():
        *path, leaf = name.split(".")
        owner = path[-1] if leaf in ("weight", "bias") and path else leaf
        owners = (owner, ".".join((*path[-2:-1], owner)))
        branch = "attention" if path and "att" in path[0].lower() else "mlp"
        if any(each in OUTPUT_PROJECTIONS[branch] for each in owners):
            yield name, parameter


def outer_attributes(model: PreTrainedModel, stack_path: str) -> dict[tuple[str, str], Any]:
    """Plain attributes of the modules outside the stack (`has_sliding_layers`), by module name and attribute.

    A native `__init__` derives some of them from the per-layer config, so they change when layers do.
    """
    return {
        (name, key): value
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{stack_path}.")
        for key, value in _scalars(module).items()
    }


def native_differences(
    layers: Sequence[nn.Module],
    twin_layers: Sequence[nn.Module],
    own: Sequence[Collection[str]] | None = None,
    there: str = "natively",
) -> list[str]:
    """In what live layers differ from those a native model of the same config would have.

    An empty list means: saved with this config and loaded without not_hf, these layers compute the same.

    Args:
        layers: The live ones.
        twin_layers: The native ones, or others to compare with.
        own: For each layer, differences that are its own wherever it stands (a quantizer's modules).
        there: Where the twins are, in words.
    """
    return [
        f"layer {n}{difference}"
        for n, (layer, twin) in enumerate(zip(layers, twin_layers, strict=True))
        for difference in layer_differences(layer, twin, there)
        if own is None or difference not in own[n]
    ]


def layer_differences(layer: nn.Module, twin: nn.Module, there: str = "natively") -> list[str]:
    """In what one layer differs from a native one; each reads on after the layer's name."""
    differences: list[str] = []
    ours, theirs = dict(layer.named_modules()), dict(twin.named_modules())
    if shape_of(layer) != shape_of(twin):
        differences += _tensor_differences("", shape_of(layer), shape_of(twin), there)
    for name in ours.keys() & theirs.keys():
        mine, native = _scalars(ours[name]), _scalars(theirs[name])
        where = f" {name}".rstrip()
        if type(ours[name]) is not type(theirs[name]):
            differences.append(f"{where} is {type(ours[name]).__name__}, {there} {type(theirs[name]).__name__}")
        differences += [
            f"{where}.{key} is {mine[key]!r}, {there} {native[key]!r}"
            for key in sorted(mine.keys() & native.keys())
            if not _same(mine[key], native[key])
        ]
    return differences


def same_modules(layers: Iterable[nn.Module], others: Iterable[nn.Module]) -> bool:
    """Whether layers are built of modules of the same classes and shapes."""
    return all(
        {name: type(module) for name, module in layer.named_modules()}
        == {name: type(module) for name, module in other.named_modules()}
        and shape_of(layer) == shape_of(other)
        for layer, other in zip(layers, others, strict=True)
    )


def inherit_attributes(layers: Sequence[nn.Module], originals: Sequence[nn.Module]) -> None:
    """Give layers the plain attributes that their originals have because of where they stand in the base.

    Args:
        layers: Layers of an organ, built as the first ones of a shorter model.
        originals: The same layers of the base, on the meta device.

    Raises:
        UnsupportedArchitectureError: At their new place they are built of other modules or shapes.
    """
    for layer, original in zip(layers, originals, strict=True):
        ours, theirs = dict(layer.named_modules()), dict(original.named_modules())
        if not same_modules([layer], [original]):
            raise UnsupportedArchitectureError(
                "these layers are built otherwise at another place of the stack; cut a span that does not depend on it"
            )
        for name, module in theirs.items():
            mine = _scalars(ours[name])
            for key, value in _scalars(module).items():
                if key not in INDEX_ATTRIBUTES and key in mine and mine[key] != value:
                    setattr(ours[name], key, value)


def shape_of(layer: nn.Module) -> dict[str, tuple[int, ...]]:
    """Shape of each parameter and buffer below `layer`."""
    return {name: tuple(tensor.shape) for name, tensor in (*layer.named_parameters(), *layer.named_buffers())}


def fingerprint(config: PreTrainedConfig) -> str:
    """SHA-256 of what a config says about its layers: equal for two fine-tunes of one model."""
    ignored = _NAMES | {
        "vocab_size",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "use_cache",
        "tie_word_embeddings",
    }
    values = {key: value for key, value in config.to_dict().items() if key not in ignored}
    return hashlib.sha256(json.dumps(values, sort_keys=True, default=str).encode()).hexdigest()


# Config keys that say nothing about what a model computes.
_NAMES = {"_name_or_path", "architectures", "transformers_version", "dtype", "id2label", "label2id"} | {
    "quantization_config"  # how files hold weights; an organ that joins does so in its own dtype
}

# What every module has, and what is set by the user or the loader: neither comes from the config.
_NOT_DERIVED = vars(nn.Module()).keys() | {
    "gradient_checkpointing",
    "name_or_path",
    "_attn_implementation",
    "vocab_size",
    "padding_idx",
}


def _index_holders(layer: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    for module in layer.modules():
        for name in INDEX_ATTRIBUTES:
            if type(vars(module).get(name)) is int:  # None where a model does not number this module
                yield module, name


def _scalars(module: nn.Module) -> dict[str, Any]:
    return {
        key: value
        for key, value in vars(module).items()
        if key not in _NOT_DERIVED
        and isinstance(value, (bool, int, float, str, tuple, type(None)))
        and "dropout" not in key
        and not (key == "p" and isinstance(module, nn.Dropout))  # training alone
        and not key.startswith(("_is_hf", "_version", "_output_capturing", "call_super_init", "dump_patches"))
    }


def _tensor_differences(where: str, ours: dict[str, Any], theirs: dict[str, Any], there: str) -> list[str]:
    return [
        f"{where} {name} has shape {ours.get(name)}, {there} {theirs.get(name)}"
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name)
    ]


def _is_list(config: PreTrainedConfig, key: str) -> bool:
    return isinstance(getattr(config, key, None), (list, tuple))


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two values are one; floats as far as float32 tells them apart, since GGUF files hold them so."""
    if isinstance(ours, float) and isinstance(theirs, float):
        return math.isclose(ours, theirs, rel_tol=2**-24)
    return bool(ours == theirs)
