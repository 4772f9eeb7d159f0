"""The status of an organ in a model, for `get_donor_status`."""

from __future__ import annotations

from dataclasses import dataclass

from not_hf.recipient.organ import Organ


@dataclass(frozen=True)
class DonorStatus:
    """Status of one loaded organ.

    Args:
        name: Name in the model.
        active: Whether the organ is in the stack; `False` inside `disable_donors()`.
        position: Position among the recipient's own layers.
        mode: `"insert"` or `"replace"`.
        scale: Factor of what its layers add to the residual stream.
        layers: Indices of its layers in the model's stack; empty if inactive.
        span: Half-open span of the base's layers that it was cut from.
        base: Hub ID or folder of that base.
        donor: Folder or Hub ID of the donor, `None` for a `DonorModel`.
        revision: Commit of the donor's repo.
        num_parameters: Number of parameters.
        num_trainable_parameters: Number of parameters that require gradients.
        dtypes: dtypes of its parameters (`float32`, …).
        devices: Devices of its parameters (`cpu`, `cuda:0`, …).
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
    """Describe an organ whose layers have these indices in the stack."""
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
