"""`DonorConfig`: what a donor repo's `config.json` says about an organ and the model it was cut from."""

from __future__ import annotations

import copy
import math
import os
from dataclasses import dataclass
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import PreTrainedConfig

from not_hf.errors import CorruptDonorError, NotHFError, UnsupportedArchitectureError, one_line
from not_hf.registration import register_models
from not_hf.version import __version__

MODES = ("insert", "replace")
INITS = ("copy", "identity")


class DonorConfig(PreTrainedConfig):
    """Configuration of a donor: one organ, or a composition that lists several.

    Args:
        base_model_name_or_path: Hub ID or local path of the model the organ was cut from.
        base_revision: Commit of that repo at cut time, `None` for a local folder or a live model.
        base_subfolder: Folder of the base within its repo, `None` when it is at the root.
        layers: Half-open span `[i, j]` of the base's layers.
        position: Where the organ goes, counted in the recipient's own layers.
        mode: `"insert"` (before layer `position`) or `"replace"` (of layers `position … position + k`).
        scale: What each layer of an inserted organ writes to the residual stream is multiplied by this in a recipient.
            The weights are stored without it.
        init: `"copy"` (layers as cut) or `"identity"` (an inserted organ starts as an exact no-op).
        base_config: The base's native config as a dict, its `model_type` included.
        organ_config: The same config reduced to the span: `num_hidden_layers == j - i`.
        domain: Free text naming what the organ was trained for.
        datasets: Names of the training datasets, Hub IDs where there are.
        tokens_seen: Number of training tokens.
        metrics: Measured numbers, a nested dict of floats.
        license: The Hub's identifier of the organ's licence, a list when several hold; the base's unless given.
        license_name: What `license: other` stands for.
        license_link: Where its text is.
        not_hf_version: Version of not_hf that cut the organ.
        fingerprint: SHA-256 of the base's config reduced to what shapes its layers.
        donors: For a composition, one entry per organ (see `docs/architecture.md`); `None` for a single organ.
    """

    model_type = "not_donor"

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

    def __post_init__(self, **kwargs: Any) -> None:
        register_models()
        self.not_hf_version = self.not_hf_version or __version__
        super().__post_init__(**kwargs)

    @classmethod
    def get_config_dict(
        cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """As in transformers, but the config of something else raises `NotHFError`."""
        where = "/".join(filter(None, (os.fspath(pretrained_model_name_or_path), kwargs.get("subfolder"))))
        try:
            values, kwargs = super().get_config_dict(pretrained_model_name_or_path, **kwargs)
        except (TypeError, AttributeError) as error:  # valid JSON, but not an object
            raise CorruptDonorError(f"{where}: config.json holds no JSON object") from error
        if not isinstance(values, dict):
            raise CorruptDonorError(f"{where}: config.json holds no JSON object")
        if not values:  # how transformers reports a missing file
            raise NotHFError(
                f"{where} is not a donor: it has no config.json; "
                "layers saved with torch.save are imported with not_hf.import_checkpoint or `not-hf import`"
            )
        if (model_type := values.get("model_type")) != cls.model_type:
            raise NotHFError(f"{where} is not a donor: its config has model_type {model_type!r}")
        return values, kwargs

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:  # (config, unused kwargs) when asked for
        """As in transformers, but values of a wrong type or meaning raise `CorruptDonorError`."""
        try:
            return super().from_dict(config_dict, **kwargs)
        except (StrictDataclassError, TypeError, AttributeError, IndexError, KeyError) as error:
            raise CorruptDonorError(f"donor config.json: {one_line(error, 300)}") from error

    def to_diff_dict(self) -> dict[str, Any]:
        """As in transformers, but the keys that place an organ are written even where they are the default."""
        return {**super().to_diff_dict(), "mode": self.mode, "init": self.init}

    @property
    def span(self) -> tuple[int, int]:
        """`layers` as a tuple `(i, j)`, half open."""
        i, j = self.layers or (0, 0)
        return i, j

    @property
    def num_organ_layers(self) -> int:
        """Number of layers in the organ, `k = j - i`."""
        return self.span[1] - self.span[0]

    def native_config(self, which: str = "organ_config") -> PreTrainedConfig:
        """The base's (`"base_config"`) or the organ's (`"organ_config"`) config as its native class.

        Raises:
            CorruptDonorError: The dict is missing or the native class refuses it.
            UnsupportedArchitectureError: transformers does not know its `model_type`.
        """
        from transformers import AutoConfig  # its table of classes asks for this module, see registration

        values = getattr(self, which)
        model_type = values.get("model_type") if isinstance(values, dict) else None
        if not isinstance(model_type, str):
            raise CorruptDonorError(f"donor config has no {which} with a model_type; cut the organ again")
        try:
            return AutoConfig.for_model(**copy.deepcopy(values))
        except (ValueError, KeyError) as error:
            if "Unrecognized model identifier" in str(error):
                raise UnsupportedArchitectureError(
                    f"this transformers release does not know model_type {model_type!r}; upgrade transformers"
                ) from error
            raise CorruptDonorError(f"donor config has an unusable {which}: {one_line(error, 300)}") from error
        except Exception as error:  # a native config may raise anything on values of a wrong type
            raise CorruptDonorError(f"donor config has an unusable {which}: {one_line(error, 300)}") from error

    def check(self) -> OrganSpec:
        """Check that the config agrees with itself.

        Returns:
            The config with the native configs it stands for.

        Raises:
            CorruptDonorError: One line naming the first contradiction.
            NotHFError: It lists organs and is not an organ itself.
        """
        if self.donors is not None:
            raise NotHFError(
                "this repo is a composition of several organs; load it with TransplantedForCausalLM.from_pretrained, "
                "or name the repo or the subfolder of one organ"
            )
        span = self.layers
        if not (isinstance(span, list) and len(span) == 2 and all(type(n) is int for n in span)):
            raise CorruptDonorError(f"donor config layers must be two integers [i, j], got {span!r}")
        if self.mode not in MODES or self.init not in INITS:
            raise CorruptDonorError(
                f"donor config needs mode in {MODES} and init in {INITS}, got {self.mode!r} and {self.init!r}"
            )
        if type(self.scale) not in (int, float) or not math.isfinite(self.scale):
            raise CorruptDonorError(f"donor config scale must be a finite number, got {self.scale!r}")
        base, organ = self.native_config("base_config"), self.native_config()
        if not 0 <= span[0] < span[1] <= base.num_hidden_layers:
            raise CorruptDonorError(
                f"donor config layers {span} are not a span of the base's {base.num_hidden_layers} layers"
            )
        if organ.num_hidden_layers != self.num_organ_layers:
            raise CorruptDonorError(
                f"donor config layers {span} name {self.num_organ_layers} layers, "
                f"its organ_config has {organ.num_hidden_layers}"
            )
        if type(self.position) is not int or self.position < 0:
            raise CorruptDonorError(f"donor config position must be an integer >= 0, got {self.position!r}")
        return OrganSpec(self, base, organ)


@dataclass(frozen=True)
class OrganSpec:
    """A donor's config that agrees with itself, and the native configs it stands for, which nobody changes.

    Args:
        config: Of the donor.
        base: Native config of the model that the layers were cut from.
        organ: The same, reduced to the span.
    """

    config: DonorConfig
    base: PreTrainedConfig
    organ: PreTrainedConfig

    @property
    def num_layers(self) -> int:
        """Number of layers in the organ."""
        return self.config.num_organ_layers
