"""`not-hf transplant`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group
from rich.table import Table

from not_hf.cli.app import Result, command, facts, output_folder
from not_hf.cli.options import Force, Token, given
from not_hf.errors import interval, megabytes

if TYPE_CHECKING:
    from not_hf import OrganSource
    from not_hf.composition.plan import Plan

_KEYS = ("name", "position", "mode", "scale", "revision", "subfolder", "active")


@command("not-hf transplant openai-community/gpt2 me/gpt2-kjv organ,position=1,mode=replace -o gpt2-both")
def transplant(
    names: Annotated[
        list[str],
        typer.Argument(metavar="NAME", help="Recipient, then donors: folders or Hub IDs.", show_default=False),
    ],
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder to write.", show_default=False)] = None,
    embed: Annotated[bool, typer.Option("--embed", help="Also copy donors on the Hub into the folder.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would be written, and write nothing.")] = False,
    token: Token = None,
    force: Force = False,
) -> Result:
    """Write a composition: a folder that lists several donors and puts them into a recipient. Loads no weights.

    Donors on the Hub are listed by ID, pinned to their current commits; local ones are copied in. The recipient may be
    left out: then it is the base that the donors were cut from.

    A donor's own config is overridden by options after its name, with commas and without spaces: name=NAME,
    position=N, mode=insert or mode=replace, scale=NUMBER, revision=BRANCH, subfolder=PATH, active=no. A recipient
    takes revision=BRANCH only.
    """
    sources = [_source(text) for text in names]
    if output is None and not dry_run:
        raise typer.BadParameter("is required without --dry-run", param_hint="--output")
    from not_hf import compose

    hub = given(token=token)
    base, donors = _split(sources, hub)
    if dry_run or output is None:
        plan = compose(donors, *base, **hub)
    else:
        with output_folder(output, force):
            plan = compose(donors, *base, **hub)
            plan.save_pretrained(output, embed)
    data = _described(plan, embed)
    return Result({"folder": None if dry_run else str(output), **data}, _view(data, dry_run, output))


def _source(text: str) -> OrganSource:
    """Read the donor, or recipient, that one argument names."""
    from not_hf import OrganSource

    parts = text.split(",")
    # the name of a folder may contain commas
    end = max((n for n in range(1, len(parts) + 1) if os.path.isdir(",".join(parts[:n]))), default=1)
    donor, options = ",".join(parts[:end]), dict[str, Any]()
    for option in parts[end:]:
        key, _, value = option.partition("=")
        if key not in _KEYS or not value:
            _refuse(text, f"{option!r} is not KEY=VALUE, where KEY is one of {', '.join(_KEYS)}")
        if key in options:
            _refuse(text, f"{key} is given twice")
        options[key] = value
    if not donor:
        _refuse(text, "no folder or Hub ID before the comma")
    if "position" in options:
        if not options["position"].isdecimal():
            _refuse(text, f"position {options['position']!r} must be a whole number from 0")
        options["position"] = int(options["position"])
    if "scale" in options:
        try:
            options["scale"] = float(options["scale"])
        except ValueError:
            _refuse(text, f"scale {options['scale']!r} must be a number")
    if options.get("mode", "insert") not in ("insert", "replace"):
        _refuse(text, f"mode {options['mode']!r} must be insert or replace")
    if options.get("active", "yes") not in ("yes", "no"):
        _refuse(text, f"active {options['active']!r} must be yes or no")
    return OrganSource(**{"name": "", "donor": donor, **options, "active": options.get("active") != "no"})


def _refuse(text: str, reason: str) -> None:
    raise typer.BadParameter(f"{text!r}: {reason}", param_hint="DONOR")


def _split(sources: list[OrganSource], hub: dict[str, Any]) -> tuple[tuple[Any, ...], list[OrganSource]]:
    """Separate the recipient and its revision, if the first source is no donor, from the donors."""
    from transformers import AutoConfig

    from not_hf import DonorConfig, OrganSource

    first = sources[0]
    name, where = str(first.donor), {**hub, "revision": first.revision, "subfolder": first.subfolder or ""}
    if isinstance(AutoConfig.from_pretrained(name, **where), DonorConfig):
        return (), sources
    if first != OrganSource("", name, first.revision):
        _refuse(name, "the recipient takes a revision only")
    if len(sources) == 1:
        _refuse(name, "this is the recipient; name the donors after it")
    return (name, first.revision), sources[1:]


def _described(plan: Plan, embed: bool) -> dict[str, Any]:
    """Present a plan for `--json`."""
    entries = plan.config(embed).donors or []
    cut_from = {organ.name: organ.config.span[0] for organ in plan.organs}
    organs = [
        {
            **entry,
            "source": str(organ.source.donor),
            "source_revision": organ.source.revision,
            "source_subfolder": organ.source.subfolder,
            "layers": organ.config.layers,
            "num_parameters": organ.num_parameters,
            "size": organ.size,
        }
        for entry, organ in zip(entries, plan.organs, strict=True)
    ]
    stack = [
        {"layer": n, "organ": name, "index": i, "base_layer": i if name is None else cut_from[name] + i}
        for n, (name, i) in enumerate(plan.stack)
    ]
    return {
        "base": plan.base,
        "base_revision": plan.base_revision,
        "num_layers_before": plan.base_config.num_hidden_layers,
        "num_layers_after": len(stack),
        "donors": organs,
        "stack": stack,
    }


def _view(data: dict[str, Any], dry_run: bool, output: Path | None) -> Group:
    """Present a plan for people: a table of the organs, then one of the stack with a row per layer."""
    organs = Table("organ", "from", "commit", "goes", "layers", "parameters", "size")
    for entry in data["donors"]:
        source = "/".join(filter(None, (entry["source"], entry["source_subfolder"])))
        organs.add_row(
            entry["name"] + ("" if entry["active"] else " (inactive)"),
            source if "donor" in entry else f"{source} (copied in)",
            (entry["source_revision"] or "–")[:12],
            f"{entry['mode']} at {entry['position']}" + ("" if entry["scale"] == 1 else f", scale {entry['scale']:g}"),
            interval(entry["layers"]),
            f"{entry['num_parameters']:,}",
            megabytes(entry["size"]),
        )
    stack = Table("layer", "from", "cut from")
    for row in data["stack"]:
        if row["organ"] is None:
            stack.add_row(str(row["layer"]), f"recipient layer {row['index']}", "")
        else:
            stack.add_row(str(row["layer"]), f"{row['organ']} layer {row['index']}", f"base layer {row['base_layer']}")
    summary = {
        "folder": f"{output or '–'} (dry run: nothing is written)" if dry_run else output,
        "recipient": data["base"],
        "recipient's commit": data["base_revision"],
        "layers": f"{data['num_layers_before']} before, {data['num_layers_after']} after",
    }
    return Group(facts("Composition", summary), organs, stack)
