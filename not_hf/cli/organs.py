"""Commands that need no text: `extract`, `inspect`, `check`, `push`, `merge`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Group, RenderableType
from rich.table import Table

from not_hf.cli.options import Base, Donor, Dtype, Force, Init, Mode, Output, Position, Token
from not_hf.cli.run import CHECKPOINTS, Result, command, facts, output_folder

if TYPE_CHECKING:
    from not_hf import DonorConfig, DonorModel
    from not_hf.donor.compatibility import Mismatches


@command("not-hf extract openai-community/gpt2 --layers 4:7 --init identity -o organ")
def extract(
    base: Annotated[str, typer.Argument(help="Model to cut from: folder or Hub ID.", show_default=False)],
    layers: Annotated[
        str, typer.Option("--layers", metavar="I:J", help="Half-open span: 4:7 is layers 4, 5, 6.", show_default=False)
    ],
    output: Output,
    position: Position = None,
    mode: Annotated[Mode, typer.Option(help="Put it before layer `position`, or in the place of layers.")] = "insert",
    init: Annotated[Init, typer.Option(help="Keep the layers as cut, or make them start as an exact no-op.")] = "copy",
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder within the repo.", show_default=False)] = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype of the organ; auto keeps the base's.")] = "auto",
    license: Annotated[
        str | None, typer.Option(help="Licence of the organ, as the Hub names it.", show_default="the base's")
    ] = None,
    base_name: Annotated[
        str | None,
        typer.Option(help="Hub ID of the base, where it is read from a copy.", show_default="where it is read from"),
    ] = None,
    token: Token = None,
    force: Force = False,
) -> Result:
    """Cut an organ out of a causal LM. Only the bytes of its layers are read."""
    span = parse_span(layers)
    hub = _given(revision=revision, subfolder=subfolder, token=token)
    with output_folder(output, force):
        from not_hf import DonorModel

        donor = DonorModel.from_base(base, span, position, mode, init, dtype=dtype, license=license, **hub)
        if base_name is not None:
            donor.config.base_model_name_or_path, donor.config.base_revision = base_name, None
        donor.save_pretrained(output)
    data = described(donor, output)
    return Result(data, facts("Cut", data))


@command("not-hf inspect gpt2-kjv")
def inspect(
    donor: Donor,
    recipient: Annotated[
        str | None, typer.Option("--recipient", help="Also say whether it fits this one.", show_default=False)
    ] = None,
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit.", show_default=False)] = None,
    subfolder: Annotated[str | None, typer.Option(help="Folder within the repo.", show_default=False)] = None,
    token: Token = None,
) -> Result:
    """Show what a donor repo holds, without reading its weights."""
    from not_hf.composition.check import recipient_problems, survey

    config, organs = survey(donor, **_given(revision=revision, subfolder=subfolder, token=token))
    tensors: list[dict[str, Any]] = [
        {
            **({"organ": organ.organ.name} if config.donors else {}),
            "name": name,
            "shape": list(tensor.shape),
            "dtype": tensor.dtype,
            "num_parameters": tensor.parameter_count,
            "size": tensor.data_offsets[1] - tensor.data_offsets[0],
        }
        for organ in organs
        for name, tensor in organ.tensors.items()
    ]
    data: dict[str, Any] = {
        "id": donor,
        "config": config.to_dict(),
        "fingerprint": config.fingerprint,
        "num_parameters": sum(tensor["num_parameters"] for tensor in tensors),
        "size": sum(tensor["size"] for tensor in tensors),
        "tensors": tensors,
        "unreadable": [organ.unreadable for organ in organs if organ.unreadable],
    }
    tables: list[RenderableType] = [_provenance(donor, config, data)]
    for title, rows in (("Organs", config.donors), ("Tensors", tensors)):
        if rows:
            columns = dict.fromkeys(key for row in rows for key in row)  # organs need not all say the same
            table = Table(*columns, title=title, title_justify="left")
            for row in rows:
                table.add_row(*(str(row.get(key, "")) for key in columns))
            tables.append(table)
    tables += data["unreadable"]
    if recipient:
        problems = recipient_problems(organs, recipient, **_given(token=token))
        data |= _compatibility(recipient, problems)
        tables.append(_verdict(donor, recipient, problems))
    return Result(data, Group(*tables))


@command("not-hf check gpt2-kjv openai-community/gpt2 --position 1")
def check(
    donor: Donor,
    recipient: Annotated[str, typer.Argument(help="Recipient: folder or Hub ID.", show_default=False)],
    position: Position = None,
    mode: Annotated[Mode | None, typer.Option(help="As in extract.", show_default="as the donor says")] = None,
    revision: Annotated[str | None, typer.Option(help="Of the donor.", show_default=False)] = None,
    subfolder: Annotated[str | None, typer.Option(help="Of the donor.", show_default=False)] = None,
    token: Token = None,
) -> Result:
    """List all that keeps an organ from working in a recipient, from configs and headers. Exit 1 if there is any."""
    from not_hf.composition.check import check_donor

    hub = _given(revision=revision, subfolder=subfolder, token=token)
    problems = check_donor(donor, recipient, position, mode, **hub)
    count = f"{len(problems)} mismatch{'es' if len(problems) > 1 else ''}"
    return Result(
        {"donor": donor, **_compatibility(recipient, problems)},
        _verdict(donor, recipient, problems),
        f"{donor} does not fit {recipient}: {count}" if problems else None,
    )


@command("not-hf push gpt2-kjv me/gpt2-kjv --private")
def push(
    folder: Annotated[Path, typer.Argument(help="Folder of a donor.", show_default=False)],
    repo_id: Annotated[str, typer.Argument(help="Repo on the Hub, created when missing.", show_default=False)],
    private: Annotated[bool, typer.Option("--private", help="Make a new repo private.")] = False,
    revision: Annotated[str | None, typer.Option(help="Branch, created when missing.", show_default="main")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    token: Token = None,
    commit_message: Annotated[str, typer.Option(help="Of the commit.")] = "Upload organ",
) -> Result:
    """Share an organ: check it strictly, then upload its folder, card included, as one commit."""
    from not_hf.composition.publish import push_donor

    commit = push_donor(
        folder,
        repo_id,
        ignore=[CHECKPOINTS],
        private=private or None,
        revision=revision,
        create_pr=create_pr,
        token=token,
        commit_message=commit_message,
    )
    repo = commit.repo_url
    data = {"repo_id": repo.repo_id, "url": str(repo), "commit": commit.oid, "pull_request": commit.pr_url}
    return Result(data, facts("Pushed", data))


@command("not-hf merge gpt2-kjv -o gpt2-kjv-merged")
def merge(
    donor: Donor,
    output: Output,
    base: Base = None,
    max_shard_size: Annotated[str, typer.Option(help="Past this size the weights are sharded.")] = "5GB",
    force: Force = False,
) -> Result:
    """Write the recipient with its organ as a native model with tokenizer and card, which loads without not_hf."""
    from transformers import AutoTokenizer

    from not_hf import TransplantedForCausalLM
    from not_hf.cards.merged import merged_card

    with output_folder(output, force):
        model = TransplantedForCausalLM.from_pretrained(*((base, donor) if base else (donor,)))
        card = merged_card(model, output)
        native = model.merge_and_unload()
        native.save_pretrained(output, max_shard_size=max_shard_size)
        AutoTokenizer.from_pretrained(base or donor).save_pretrained(output)
        card.save(output / "README.md")
    data = {
        "folder": str(output),
        "architecture": type(native).__name__,
        "num_layers": native.config.num_hidden_layers,
        "num_parameters": native.num_parameters(),
    }
    return Result(data, facts("Merged", data))


def _given(**options: str | None) -> dict[str, Any]:
    return {key: value for key, value in options.items() if value is not None}


def parse_span(layers: str) -> tuple[int, int]:
    """`I:J` as two integers."""
    first, colon, last = layers.partition(":")
    try:
        if colon:
            return int(first), int(last)
    except ValueError:
        pass
    raise typer.BadParameter(f"{layers!r} is not a span I:J of two integers, such as 4:7", param_hint="--layers")


def described(donor: DonorModel, folder: Path) -> dict[str, Any]:
    """What `extract` and `import` say about the organ that they wrote."""
    return {
        "folder": str(folder),
        "base": donor.config.base_model_name_or_path,
        "base_revision": donor.config.base_revision,
        "layers": donor.config.layers,
        "position": donor.config.position,
        "mode": donor.config.mode,
        "init": donor.config.init,
        "license": donor.config.license,
        "num_parameters": donor.num_parameters(),
        "dtype": str(donor.dtype).removeprefix("torch."),
    }


def _compatibility(recipient: str, found: Mismatches) -> dict[str, Any]:
    return {
        "recipient": recipient,
        "compatible": not found,
        "mismatches": list(found),
        "differences": found.differences,
    }


def _verdict(donor: str, recipient: str, found: Mismatches) -> str:
    lines = list(found) or [f"{donor} fits {recipient}"]
    return "\n".join(lines + [f"differs: {each}" for each in found.differences])


def _provenance(donor: str, config: DonorConfig, data: dict[str, Any]) -> Table:
    return facts(
        donor,
        {
            "base": config.base_model_name_or_path,
            "base revision": config.base_revision,
            "architecture": (config.base_config or {}).get("model_type"),
            "layers": config.layers,
            "position": config.position,
            "mode": config.mode,
            "init": config.init,
            "parameters": data["num_parameters"],
            "size": f"{data['size'] / 1e6:,.1f} MB",
            "domain": config.domain,
            "datasets": ", ".join(config.datasets or []) or None,
            "tokens seen": config.tokens_seen,
            "metrics": config.metrics,
            "license": config.license,
            "not_hf version": config.not_hf_version,
            "fingerprint": config.fingerprint,
        },
    )
