"""`DonorConfig`: the `config.json` of a donor."""

from __future__ import annotations

import dataclasses
import functools
import inspect
import logging
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from not_hf.architecture.part_names import ALL, is_path, parts_problem
from not_hf.architecture.releases import make_config
from not_hf.architecture.tables import DENSE_PREFIXES, PERIODS
from not_hf.errors import CorruptDonorError, NotHFError, UnsupportedArchitectureError, one_line, reading_repo, some
from not_hf.limits import MAX_CONFIG, MAX_COUNT, MAX_LAYERS, is_of, read_json, require_count, require_plain
from not_hf.registration import register_models
from not_hf.version import __version__

MODES = ("insert", "replace")
INITS = ("copy", "identity")
DELTA = "delta"  # variant of the weight files that hold changes of the base's layers, see `donor.delta`

# What a donor does not choose: how attention and experts are computed, and how weights are packed.
_CHOICES = ("attn_implementation", "experts_implementation", "quantization_config")
# What does not concern its layers either: code, names, and labels, of which transformers makes as many as it is told
_NOT_OF_LAYERS = ("auto_map", "trust_remote_code", "name_or_path", "num_labels", "id2label", "label2id")
_TAKEN = ("return_unused_kwargs", "name_or_path", "attn_implementation", "experts_implementation")  # by `from_dict`
# Root keys that transformers writes, with the types of their values, and those that mean nothing for a donor
_WRITTEN = {
    **{"model_type": str, "architectures": list[str] | None, "transformers_version": str | None},
    **{"dtype": str | None, "torch_dtype": str | None, "chunk_size_feed_forward": int},
    **dict.fromkeys(("output_attentions", "output_hidden_states", "return_dict"), bool | None),
}
_FOREIGN = {"_commit_hash", "_name_or_path", "id2label", "label2id", "problem_type", "is_encoder_decoder"}

logger = logging.getLogger(__name__)


class DonorConfig(PreTrainedConfig):
    """Config of a donor, or of a composition of donors.

    Args:
        base_model_name_or_path: Hub ID or folder of the base.
        base_revision: Commit of the base, `None` for a folder or a live model.
        base_subfolder: Folder of the base within its repo.
        layers: Half-open span `[i, j]` of the base's layers.
        position: Position of the organ among the recipient's own layers.
        mode: `"insert"` (before layer `position`) or `"replace"` (layers `position … position + k`).
        best_position: Where a sweep found it best (`PositionSweep.record`): `position`, `mode` and what was measured.
        scale: Factor of an inserted organ's contribution to the residual stream, or of what a replacement changes; the
            weights are unscaled.
        init: `"copy"` (layers as cut) or `"identity"` (an inserted organ starts as an exact no-op).
        modules: What the organ holds of each layer: `"all"`, `"outputs"`, `"attention"`, `"mlp"`, or names of modules.
        modules_to_save: Names of modules beside the layers that the donor holds too, such as `embed_tokens`.
        trainable_token_indices: Rows of embeddings or of the head that it holds, by the name of the module.
        labels: Names of the classes, in order, if a classifier is among these modules.
        base_config: Native config of the base as a dict, with its `model_type`.
        organ_config: The same config, reduced to the span: `num_hidden_layers == j - i`.
        domain: Domain of the training data, free text.
        datasets: Names of the training datasets, preferably Hub IDs.
        tokens_seen: Number of training tokens.
        metrics: Results, a nested dict of floats; and under `privacy` what a probe found, in sentences.
        license: The Hub's identifier of the licence, or a list of them; default: the base's.
        license_name: Name of the licence, if `license` is `other` or includes it.
        license_link: Link to that licence.
        not_hf_version: Version of not_hf that cut the donor.
        fingerprint: SHA-256 of the part of the base's config that concerns its layers.
        donors: Entries of a composition, one per organ; `None` for a donor.
        delta: How the weights are stored as a change of the base's layers, see `donor.delta`; `None`: whole.
        digests: Digests of the weights beside this config, by file: SHA-256 over names, dtypes, shapes and bytes of
            the tensors. `None` for a donor in memory.

    Examples:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import DonorModel
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> config = DonorModel.from_base(base, layers=(1, 3)).config
        >>> config.layers, config.position, config.mode, config.native_config().num_hidden_layers
        ([1, 3], 3, 'insert', 2)
    """

    model_type = "not_donor"
    auto_map: ClassVar[Mapping[str, str]] = MappingProxyType({})  # a donor holds no code; TRL expects the attribute

    base_model_name_or_path: str | None = None
    base_revision: str | None = None
    base_subfolder: str | None = None
    layers: list[int] | None = None
    position: int | None = None
    mode: str = "insert"
    best_position: dict[str, Any] | None = None
    scale: float = 1.0
    init: str = "copy"
    modules: str | list[str] = ALL
    modules_to_save: list[str] | None = None
    trainable_token_indices: dict[str, list[int]] | None = None
    labels: list[str] | None = None
    base_config: dict[str, Any] | None = None
    organ_config: dict[str, Any] | None = None
    domain: str | None = None
    datasets: list[str] | None = None
    tokens_seen: int | None = None
    metrics: dict[str, Any] | None = None
    license: str | list[str] | None = None
    license_name: str | None = None
    license_link: str | None = None
    not_hf_version: str | None = None
    fingerprint: str | None = None
    donors: list[dict[str, Any]] | None = None
    delta: dict[str, Any] | None = None
    digests: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        register_models()
        self.not_hf_version = self.not_hf_version or __version__
        super().__post_init__(**kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:  # type: ignore[override]
        """As in transformers, of which older releases lose the token."""
        values, kwargs = cls.get_config_dict(pretrained_model_name_or_path, **kwargs)
        return cls.from_dict(values, **kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but a config that is not a donor's raises `NotHFError`."""
        where = "/".join(filter(None, (os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder"))))
        try:
            with reading_repo(os.fspath(pretrained_model_name_or_path)):
                values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError):  # valid JSON, but not an object
            values = None
        if not isinstance(values, dict):
            raise CorruptDonorError(f"{where}: config.json must hold a JSON object")
        if not values:  # transformers' result for a missing file
            raise NotHFError(
                f"{where} is not a donor: it has no config.json; "
                "to import layers saved with torch.save, use not_hf.import_checkpoint or `not-hf import`"
            )
        if (model_type := values.get("model_type")) != cls.model_type:
            raise NotHFError(f"{where} is not a donor: its config has model_type {model_type!r:.100}, not 'not_donor'")
        return values, kwargs

    @classmethod
    def _dict_from_json_file(cls, json_file: str | os.PathLike[str]) -> dict[str, Any]:
        """As in transformers, but within limits."""
        values = cls._decode_special_floats(read_json(json_file, MAX_CONFIG))
        if isinstance(values, dict):
            values.pop("configuration_files", None)  # transformers would read another file instead
        return values

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # or (config, unused kwargs)
        """As in transformers, but invalid values raise `CorruptDonorError`, and unknown keys are ignored.

        What a donor's config says of attention, experts and quantization is ignored too: that is the caller's choice.
        """
        values = _known_values(config_dict)
        try:
            made: Any = super().from_dict(values, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise CorruptDonorError(f"donor config.json: {one_line(error, 300)}") from error
        if kwargs.get("return_unused_kwargs"):  # what every config has (num_labels, …) is meant for the recipient
            own = {*cls.__annotations__, *_TAKEN} - (chosen := {"modules_to_save", "trainable_token_indices"})
            made[1].update({key: value for key, value in kwargs.items() if key not in own and not key.startswith("_")})
            vars(made[0]).update({key: values.get(key) for key in chosen})
        return made

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, but always with `mode` and `init`."""
        return {**super().to_diff_dict(), "mode": self.mode, "init": self.init}

    @property
    def span(self) -> tuple[int, int]:
        """`layers` as a tuple `(i, j)`, half open."""
        i, j = self.layers or (0, 0)
        return i, j

    @property
    def weights_variant(self) -> str | None:
        """The variant of the weight files that hold the donor; `None` for whole ones."""
        return None if self.delta is None else DELTA

    @property
    def num_organ_layers(self) -> int:
        """Number of layers, `k = j - i`."""
        return self.span[1] - self.span[0]

    def native_config(self, which: str = "organ_config") -> PreTrainedConfig:
        """Return `base_config` or `organ_config` as an instance of its native class.

        Raises:
            CorruptDonorError: The dict is missing or invalid.
            UnsupportedArchitectureError: This release of transformers does not have its `model_type`.
        """
        from transformers import CONFIG_MAPPING  # its import registers this module's class, see registration

        values = getattr(self, which)
        model_type = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(model_type, str):
            raise CorruptDonorError(f"donor config has no {which} with a model_type; cut the organ again")
        if model_type not in CONFIG_MAPPING or model_type == self.model_type:
            raise UnsupportedArchitectureError(
                f"this release of transformers does not have model_type {model_type!r:.100}; upgrade transformers"
            )
        require_plain(values, f"donor config {which}")
        try:
            native_class = CONFIG_MAPPING[model_type]
            native = make_config(native_class, _native_values(values, native_class))
            native.to_dict()
            if type(native.num_hidden_layers) is not int:
                raise TypeError(f"num_hidden_layers must be an integer, got {native.num_hidden_layers!r:.100}")
        except CorruptDonorError:
            raise
        except Exception as error:  # a native config may raise anything on invalid values
            raise CorruptDonorError(f"donor config has an invalid {which}: {one_line(error, 300)}") from error
        return native

    def check(self) -> OrganSpec:
        """Check the config, and return it with its native configs.

        Raises:
            CorruptDonorError: A value is invalid, or values contradict each other.
            NotHFError: This is the config of a composition.
        """
        if self.donors is not None:
            raise NotHFError(
                "this is a composition of several organs; load it with TransplantedForCausalLM.from_pretrained, "
                "or give the repo or subfolder of one organ"
            )
        span = self.layers
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise CorruptDonorError(f"donor config layers must be two integers [i, j], got {span!r}")
        if self.mode not in MODES or self.init not in INITS:
            raise CorruptDonorError(
                f"donor config mode must be in {MODES} and init in {INITS}, got {self.mode!r} and {self.init!r}"
            )
        if type(self.scale) not in (int, float) or not abs(self.scale) <= sys.float_info.max:
            raise CorruptDonorError(f"donor config scale must be a finite number, got {self.scale!r}")
        self._check_modules()
        base, organ = self.native_config("base_config"), self.native_config()
        if not 0 <= span[0] < span[1] <= base.num_hidden_layers:
            raise CorruptDonorError(
                f"donor config layers must be a span [i, j] of the base's {base.num_hidden_layers} layers, got {span}"
            )
        if organ.num_hidden_layers != self.num_organ_layers:
            raise CorruptDonorError(
                f"donor config layers {span} are {self.num_organ_layers} layers, "
                f"but organ_config has {organ.num_hidden_layers}"
            )
        if type(self.position) is not int or self.position < 0:
            raise CorruptDonorError(f"donor config position must be an integer >= 0, got {self.position!r}")
        return OrganSpec(self, base, organ)

    def _check_modules(self) -> None:
        if problem := parts_problem(self.modules):
            raise CorruptDonorError(f"donor config {problem}")
        if self.modules != ALL and (self.mode, self.init) != ("replace", "copy"):
            raise CorruptDonorError("donor config: parts of layers need mode 'replace' and init 'copy'")
        rows = self.trainable_token_indices or {}
        names = [*(self.modules_to_save or []), *rows]
        if len(set(names)) < len(names) or not all(map(is_path, names)):
            raise CorruptDonorError(
                f"donor config modules_to_save and trainable_token_indices must name modules, each once: {some(names)}"
            )
        for name, indices in rows.items():
            if not indices or len(set(indices)) < len(indices) or min(indices) < 0:
                raise CorruptDonorError(
                    f"donor config trainable_token_indices of {name} must be distinct token ids, got {indices!r:.200}"
                )


@dataclass(frozen=True)
class OrganSpec:
    """A checked config of a donor with its native configs, which must not be changed."""

    config: DonorConfig
    base: PreTrainedConfig
    organ: PreTrainedConfig  # the base's, reduced to the span


def _known_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Check the root of a donor's `config.json`, and leave out what a donor has no say in.

    Raises:
        CorruptDonorError: A value is out of range or of another type than the field of that name.
    """
    require_plain(values, "donor config.json")
    kept = {key: value for key, value in values.items() if key in _kinds()}
    ignored = sorted(map(repr, values.keys() - kept.keys() - _FOREIGN))
    for which in ("base_config", "organ_config"):
        native = values.get(which)
        ignored += [f"{key!r} in {which}" for key in _CHOICES if isinstance(native, dict) and key in native]
    if ignored:
        logger.warning("a donor's config.json has keys that this release of not_hf ignores: %s", some(ignored))
    for key, value in kept.items():
        if key != "donors" and not is_of(value, kind := _kinds()[key]):  # entries are checked when they are read
            raise CorruptDonorError(
                f"donor config.json: no {key} of type {inspect.formatannotation(kind)}, got {value!r:.100}"
            )
    return kept


@functools.cache
def _kinds() -> dict[str, Any]:
    """Return the keys that may be in the root of a donor's `config.json`, and the types of their values."""
    fields, kinds = dataclasses.fields(DonorConfig), inspect.get_annotations(DonorConfig, eval_str=True)
    return {**_WRITTEN, **{field.name: kinds[field.name] for field in fields if field.name in kinds}}


def _native_values(values: Mapping[str, Any], native_class: type[PreTrainedConfig]) -> dict[str, Any]:
    """Copy those values of a native config that describe layers, without any that would hide a method of its class.

    Raises:
        CorruptDonorError: It has too many layers.
    """
    fields = {field.name for field in dataclasses.fields(native_class)} | native_class.attribute_map.keys()

    def describes_layers(key: str) -> bool:
        if key in fields or key in PERIODS:
            return True
        hides = hasattr(native_class, key) and not isinstance(inspect.getattr_static(native_class, key), property)
        return not hides and not key.startswith("_")

    return _chosen({key: value for key, value in values.items() if describes_layers(key)})


def _chosen(value: Any) -> Any:
    """Copy a value without the keys that a donor does not choose, in nested configs too."""
    if isinstance(value, list):
        return [_chosen(item) for item in value]
    if not isinstance(value, dict):
        return value
    for key, item in value.items():
        if str(key).endswith(("layer", "layers")) or key in ("attention_types", *DENSE_PREFIXES):
            require_count(key, item, MAX_LAYERS)
        elif str(key).startswith("num_") or str(key).endswith("experts"):
            require_count(key, item, MAX_COUNT)
    unchosen = {*_CHOICES, *(f"_{key}" for key in _CHOICES), *_NOT_OF_LAYERS}
    return {key: _chosen(item) for key, item in value.items() if key not in unchosen}
