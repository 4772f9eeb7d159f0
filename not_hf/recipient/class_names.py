"""Names of the classes of a classifier, which change with the organ that holds it."""

from __future__ import annotations

from collections.abc import Iterable

from transformers import PreTrainedConfig

from not_hf.config import DonorConfig
from not_hf.donor.saved_modules import class_names


class ClassNames:
    """Keeps `id2label` and `label2id` of a model in step with its organs.

    Args:
        base: Names of the base's classes.
    """

    def __init__(self, base: list[str]) -> None:
        self._base = base
        self._holder: DonorConfig | None = None  # whose names the model's config has

    def show(self, config: PreTrainedConfig, loaded: Iterable[DonorConfig], active: Iterable[DonorConfig]) -> None:
        """Give a model's config the names of the active organ that holds the classifier, else the base's.

        Names that the user has given it since become those of the organ, or of the base.

        Args:
            config: The model's.
            loaded: Configs of all organs.
            active: Those of the active ones.
        """
        shown = class_names(config)
        if shown != self._base and all(shown != each.labels for each in loaded):
            if self._holder is None:
                self._base = shown
            else:
                self._holder.labels = shown
        self._holder = next((each for each in active if len(each.labels or ()) == len(shown) > 0), None)
        names = (self._holder and self._holder.labels) or self._base
        if names != shown:
            label2id = {name: n for n, name in enumerate(names)}
            vars(config).update(id2label=dict(enumerate(names)), label2id=label2id)  # at once, for Ctrl-C
