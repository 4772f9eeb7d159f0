"""`not-hf inspect`."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from not_hf.cli.app import Result, command, facts
from not_hf.cli.check import mismatches_as_data, mismatches_as_text
from not_hf.cli.options import Donor, Revision, Subfolder, Token, given
from not_hf.errors import megabytes

if TYPE_CHECKING:
    from not_hf import DonorConfig


@command("not-hf inspect gpt2-kjv")
def inspect(
    donor: Donor,
    recipient: Annotated[
        str | None, typer.Option("--recipient", help="Also check whether it fits this one.", show_default=False)
    ] = None,
    revision: Revision = None,
    subfolder: Subfolder = None,
    token: Token = None,
) -> Result:
    """Show what a donor repo holds, without reading its weights."""
    from not_hf.cards.donor import describe_delta
    from not_hf.composition.check import recipient_problems, survey
    from not_hf.donor.delta import assembled
    from not_hf.hub.headers import size_of

    config, organs = survey(donor, **given(revision=revision, subfolder=subfolder, token=token))
    tensors: list[dict[str, Any]] = [
        {
            **({"organ": organ.organ.name} if config.donors else {}),
            "name": name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "num_parameters": tensor.parameter_count,
            "size": size_of(tensor),
        }
        for organ in organs
        for name, tensor in organ.tensors.items()
    ]
    data: dict[str, Any] = {
        "id": donor,
        "config": config.to_dict(),
        "fingerprint": config.fingerprint,
        "num_parameters": sum(
            math.prod(tensor.shape)
            for organ in organs
            for tensor in assembled(organ.tensors, organ.organ.spec.config).values()
        ),
        "size": sum(tensor["size"] for tensor in tensors),
        "tensors": tensors,
        "digests": {organ.organ.name: organ.organ.spec.config.digests for organ in organs},
        "unreadable": [organ.unreadable for organ in organs if organ.unreadable],
    }
    views: list[RenderableType] = [_provenance(donor, config, data, describe_delta(config))]
    views += [_table(title, rows) for title, rows in (("Organs", config.donors), ("Tensors", tensors)) if rows]
    views += data["unreadable"]
    if recipient:
        problems = recipient_problems(organs, recipient, **given(token=token))
        data |= mismatches_as_data(recipient, problems)
        views.append(mismatches_as_text(donor, recipient, problems))
    return Result(data, Group(*views))


def _provenance(donor: str, config: DonorConfig, data: dict[str, Any], stored: str | None) -> Table:
    return facts(
        donor,
        {
            "base": config.base_model_name_or_path,
            "base revision": config.base_revision,
            "architecture": (config.base_config or {}).get("model_type"),
            **({} if config.donors else _place(config)),
            "parameters": data["num_parameters"],
            "size": megabytes(data["size"]),
            "stored": stored,
            "modules to save": ", ".join(config.modules_to_save or []) or None,
            "token rows": {name: len(ids) for name, ids in (config.trainable_token_indices or {}).items()} or None,
            "labels": ", ".join(config.labels or []) or None,
            "domain": config.domain,
            "datasets": ", ".join(config.datasets or []) or None,
            "tokens seen": config.tokens_seen,
            "metrics": config.metrics,
            "license": config.license,
            "not_hf version": config.not_hf_version,
            "fingerprint": config.fingerprint,
            "digest": _short(data["digests"]) if config.donors else config.digests,
        },
    )


def _place(config: DonorConfig) -> dict[str, Any]:
    """Describe the place of one organ; a composition lists those of its organs."""
    return {
        "layers": config.layers,
        "position": config.position,
        "mode": config.mode,
        "modules": config.modules,
        "init": config.init,
    }


def _short(digests: dict[str, dict[str, str] | None]) -> str:
    """Present the digests of the organs of a composition in one line."""
    values = [f"{name} {value:.16}…" for name, files in digests.items() for value in (files or {}).values()]
    return ", ".join(values)


def _table(title: str, rows: list[dict[str, Any]]) -> Table:
    columns = dict.fromkeys(key for row in rows for key in row)  # in a composition, not every organ has every key
    table = Table(*columns, title=title, title_justify="left")
    for row in rows:
        table.add_row(*(megabytes(row[key]) if key == "size" else str(row.get(key, "")) for key in columns))
    return table
