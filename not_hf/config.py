"""`DonorConfig`: the `config.json` of a donor."""

from __future__ import annotations

import copy
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from not_hf.errors import CorruptDonorError, NotHFError, UnsupportedArchitectureError, one_line, reading_repo
from not_hf.registration import register_models
from not_hf.version import __version__

MODES = ("insert", "replace")
INITS = ("copy", "identity")


class DonorConfig(PreTrainedConfig):
    """Config of a donor, or of a composition of donors.

    Args:
        base_model_name_or_path: Hub ID or folder of the base.
        base_revision: Commit of the base, `None` for a folder or a live model.
        base_subfolder: Folder of the base within its repo.
        layers: Half-open span `[i, j]` of the base's layers.
        position: Position of the organ among the recipient's own layers.
        mode: `"insert"` (before layer `position`) or `"replace"` (layers `position … position + k`).
        scale: Factor of an inserted organ's contribution to the residual stream; the weights are unscaled.
        init: `"copy"` (layers as cut) or `"identity"` (an inserted organ starts as an exact no-op).
        base_config: Native config of the base as a dict, with its `model_type`.
        organ_config: The same config, reduced to the span: `num_hidden_layers == j - i`.
        domain: Domain of the training data, free text.
        datasets: Names of the training datasets, preferably Hub IDs.
        tokens_seen: Number of training tokens.
        metrics: Results, a nested dict of floats.
        license: The Hub's identifier of the licence, or a list of them; default: the base's.
        license_name: Name of the licence, if `license` is `other`.
        license_link: Link to that licence.
        not_hf_version: Version of not_hf that cut the donor.
        fingerprint: SHA-256 of the part of the base's config that concerns its layers.
        donors: Entries of a composition, one per organ; `None` for a donor.
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
    scale: float = 1.0
    init: str = "copy"
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
    digests: dict[str, str] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        register_models()
        self.not_hf_version = self.not_hf_version or __version__
        super().__post_init__(**kwargs)

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
            raise NotHFError(f"{where} is not a donor: its config has model_type {model_type!r}, not 'not_donor'")
        digests = values.get("digests")
        if digests is not None and not (isinstance(digests, dict) and all(map(_is_text, digests.values()))):
            raise CorruptDonorError(f"{where}: digests in config.json must map files to text, got {digests!r:.100}")
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # or (config, unused kwargs)
        """As in transformers, but invalid values raise `CorruptDonorError`."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise CorruptDonorError(f"donor config.json: {one_line(error, 300)}") from error

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, but always with `mode` and `init`."""
        return {**super().to_diff_dict(), "mode": self.mode, "init": self.init}

    @property
    def span(self) -> tuple[int, int]:
        """`layers` as a tuple `(i, j)`, half open."""
        i, j = self.layers or (0, 0)
        return i, j

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
        from transformers import AutoConfig  # its import registers this module's class, see registration

        values = getattr(self, which)
        model_type = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(model_type, str):
            raise CorruptDonorError(f"donor config has no {which} with a model_type; cut the organ again")
        try:
            return AutoConfig.for_model(**copy.deepcopy(values))
        except Exception as error:  # a native config may raise anything on invalid values
            if "Unrecognized model identifier" in str(error):
                raise UnsupportedArchitectureError(
                    f"this release of transformers does not have model_type {model_type!r}; upgrade transformers"
                ) from error
            raise CorruptDonorError(f"donor config has an invalid {which}: {one_line(error, 300)}") from error

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
        if type(self.scale) not in (int, float) or not math.isfinite(self.scale):
            raise CorruptDonorError(f"donor config scale must be a finite number, got {self.scale!r}")
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


def _is_text(value: object) -> bool:
    return isinstance(value, str)


@dataclass(frozen=True)
class OrganSpec:
    """A checked config of a donor with its native configs, which must not be changed."""

    config: DonorConfig
    base: PreTrainedConfig
    organ: PreTrainedConfig  # the base's, reduced to the span
