"""`ModelWithOrgans`: what a model tells of its organs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.cards.description import as_html, describe_organ
from not_hf.config import DonorConfig
from not_hf.recipient.organ import DonorStatus
from not_hf.recipient.surgery import Surgery

if TYPE_CHECKING:
    _Native = PreTrainedModel  # each instance is also of a native class
else:
    _Native = object


class ModelWithOrgans(_Native):
    """A native model with organs, as far as one only looks at it."""

    @property
    def _surgery(self) -> Surgery:
        """The state of the model, after what Ctrl-C has interrupted was undone or completed."""
        surgery: Surgery = vars(self)["_surgery"]
        surgery.repair(self)
        return surgery

    def extra_repr(self) -> str:
        """List the organs, for `print(model)`."""
        lines = [super().extra_repr()]
        for name, organ in self._surgery.organs.items():
            state = "" if name in self.active_donors else ", not active"
            lines.append(f"organ {name!r}: {describe_organ(organ.config)}{state}")
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        return as_html(self.donor_config)

    @property
    def active_donors(self) -> list[str]:
        """Names of the active organs, in load order."""
        return self._surgery.active

    @property
    def base_config(self) -> PreTrainedConfig:
        """Config of the recipient without organs."""
        return self._surgery.base_config

    @property
    def donor_config(self) -> dict[str, DonorConfig]:
        """Configs of the loaded organs by name, with their `position`, `mode` and `scale` in this model."""
        return {name: organ.config for name, organ in self._surgery.organs.items()}

    def get_donor_status(self) -> dict[str, DonorStatus]:
        """Describe the loaded organs by name, in load order: their places, scales, trainable parameters and more."""
        surgery = self._surgery
        places = {id(layer): n for n, layer in enumerate(surgery.stack(self).layers)}
        return {
            name: organ.status([places[id(layer)] for layer in organ.layers if id(layer) in places])
            for name, organ in surgery.organs.items()
        }

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Count the trainable parameters and all parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print the number and share of trainable parameters, as in PEFT."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )
