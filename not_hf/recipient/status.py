"""What `get_donor_status` tells of an organ in a model."""

from __future__ import annotations

from dataclasses import dataclass

from not_hf.recipient.organ import Organ


@dataclass(frozen=True)
class DonorStatus:
    """One loaded organ as it is now.

    Args:
        name: In the model.
        active: Whether it takes part in `forward`; no organ does inside `disable_donors()`.
        position: Counts the recipient's own layers.
        mode: `"insert"` or `"replace"`.
        scale: Of what its layers write to the residual stream.
        layers: Where they stand in the model's stack; empty while it is not active.
        span: Half-open, in the layers of the model it was cut from.
        base: Hub ID or folder of that model.
        donor: Folder or Hub ID it was loaded from, `None` for a `DonorModel`.
        revision: Commit of that repo.
        num_parameters: Of all its layers.
        num_trainable_parameters: Those that require gradients.
        dtypes: Of its parameters, as torch names them.
        devices: Where they are.
    """

    name: str
    active: bool
    position: int
    mode: str
    scale: float
    layers: list[int]
    span: tuple[int, int]
    base: str | None
    donor: str | None
    revision: str | None
    num_parameters: int
    num_trainable_parameters: int
    dtypes: list[str]
    devices: list[str]


def donor_status(organ: Organ, layers: list[int]) -> DonorStatus:
    """Describe an organ whose layers stand at these places of the stack."""
    parameters = [parameter for layer in organ.layers for parameter in layer.parameters()]
    config, place = organ.config, organ.place
    return DonorStatus(
        name=organ.name,
        active=bool(layers),
        position=place.position,
        mode=place.mode,
        scale=config.scale,
        layers=layers,
        span=config.span,
        base=config.base_model_name_or_path,
        donor=organ.repo,
        revision=organ.revision,
        num_parameters=sum(parameter.numel() for parameter in parameters),
        num_trainable_parameters=sum(parameter.numel() for parameter in parameters if parameter.requires_grad),
        dtypes=sorted({str(parameter.dtype).removeprefix("torch.") for parameter in parameters}),
        devices=sorted({str(parameter.device) for parameter in parameters}),
    )
