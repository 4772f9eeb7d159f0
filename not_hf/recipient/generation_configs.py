"""The generation config that organs bring with them, which applies while any of them is active."""

from __future__ import annotations

from dataclasses import dataclass

from transformers import GenerationConfig, PreTrainedModel


@dataclass
class GenerationConfigs:
    """Those of a recipient and of its organs; one that the user sets in their place stays."""

    base: GenerationConfig | None
    organs: GenerationConfig | None = None  # if they bring one

    def choose(self, model: PreTrainedModel, is_active: bool) -> None:
        """Switch a model to that of the organs, or back to the base's."""
        if self.organs is not None:
            wanted, other = (self.organs, self.base) if is_active else (self.base, self.organs)
            if model.generation_config is other:
                vars(model)["generation_config"] = wanted  # `None` of a model that cannot generate

    def of_organs(self, model: PreTrainedModel) -> GenerationConfig | None:
        """Return that which a model has while an organ is active."""
        here: GenerationConfig | None = getattr(model, "generation_config", None)
        return self.organs if self.organs is not None and here is self.base else here
