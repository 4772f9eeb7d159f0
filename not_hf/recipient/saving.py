"""Save the organs of a transplanted model, each through a `DonorModel` on the meta device."""

from __future__ import annotations

import copy
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import GenerationConfig, PreTrainedModel
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
from transformers.utils import GENERATION_CONFIG_NAME, SAFE_WEIGHTS_NAME

from not_hf.architecture.layers import computes
from not_hf.architecture.upstream import is_partitioned
from not_hf.cards.common import README, warn_once
from not_hf.cards.donor import updated_card
from not_hf.cards.license import License
from not_hf.cards.metrics import drop_measured_before, metrics_after_move
from not_hf.composition.sources import composition_config, write_entry
from not_hf.config import DonorConfig
from not_hf.donor.delta import plan_delta
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import attach
from not_hf.donor.saving import require_dtype, save_generation_config, write_donor
from not_hf.donor.tokenizer import save_local_tokenizer
from not_hf.donor.vocabulary import VOCABULARY
from not_hf.errors import NotHFError
from not_hf.hub.atomic_write import full_disk_is_oserror, replacing, require_donor_folder
from not_hf.recipient.organ import Organ
from not_hf.recipient.surgery import Surgery


def organ_tensors(
    model: PreTrainedModel, surgery: Surgery, name: str, state_dict: Mapping[str, torch.Tensor] | None = None
) -> dict[str, torch.Tensor]:
    """Collect an organ's unscaled tensors, by name in a `DonorModel`, from the model or its gathered `state_dict`.

    Raises:
        NotHFError: The organ is not in `state_dict`, or partitioned and there is none.
    """
    organ, stack = surgery.organs[name], surgery.stack(model)
    places = {id(layer): n for n, layer in enumerate(stack.layers)}
    prefix = f"{DonorModel.base_model_prefix}.{stack.path}"
    tensors: dict[str, torch.Tensor] = {}
    for n, layer in enumerate(organ.layers):
        place = f"{stack.full_path}.{places.get(id(layer))}."
        given = {k.removeprefix(place): v for k, v in (state_dict or {}).items() if k.startswith(place)}
        if not given and is_partitioned(layer):
            raise NotHFError(
                f"organ {name!r} is partitioned (DeepSpeed ZeRO-3); set stage3_gather_16bit_weights_on_model_save and "
                "save with Trainer.save_model, or pass state_dict=accelerator.get_state_dict(model)"
            )
        if state_dict and not given and id(layer) in places:
            raise NotHFError(
                f"state_dict holds nothing of organ {name!r}: no name begins with {place!r}; take it from the "
                "unwrapped model, or leave it out"
            )
        tensors |= {
            f"{prefix}.{n}.{key}": organ.at_scale_one(f"{n}.{key}", _whole(value))
            for key, value in (given or layer.state_dict()).items()
            if f"{n}.{key}" not in organ.kept
        }
    stands = all(model.get_submodule(path) is module for path, module in organ.saved.modules.items())
    in_model = state_dict if stands else None
    return tensors | {key: _whole(value).detach() for key, value in organ.saved.tensors(in_model)}


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather a tensor that FSDP shards; this must run on all processes."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def save_organs(
    model: PreTrainedModel,
    surgery: Surgery,
    names: Sequence[str],
    folder: str | os.PathLike[str],
    *,
    tensors: Mapping[str, Mapping[str, torch.Tensor]] | None = None,
    repo_id: str | None = None,
    is_main_process: bool = True,
    dtype: str | torch.dtype | None = None,
    delta: str | None = None,
    rank: int | None = None,
    is_pushed: bool = False,
    **kwargs: Any,
) -> None:
    """Save one organ as a donor, several as a composition. Arguments as in `write_donor`.

    Args:
        tensors: `organ_tensors` of each organ, if already collected.
        dtype: dtype of the files, or its name; `None`: that of each organ.
        delta: As in `plan_delta`, like `rank` and `is_pushed`.
    """
    dtype = require_dtype(dtype)
    surgery.name_classes(model)  # which notes names that the user has changed
    if surgery.own_weights.have_changed(surgery.base_layers):
        warn_once(
            "the recipient's own layers were changed since it got organs (LoRA merged into them, or trained), and "
            "only organs are saved; to keep both, save the native model: merge_and_unload().save_pretrained(...)"
        )
    shells = {name: _shell(surgery, surgery.organs[name], dtype) for name in names}
    origins = {name: _cut_from(surgery.organs[name], shell) for name, shell in shells.items()}
    deltas = {name: plan_delta(delta, rank, config, is_pushed) for name, config in origins.items()}
    states = tensors or {name: organ_tensors(model, surgery, name) for name in names}
    if dtype is not None:
        states = {
            name: {key: tensor.to(dtype) if computes(tensor) else tensor for key, tensor in state.items()}
            for name, state in states.items()
        }
    for name, shell in shells.items():
        _require_own(name, states[name], shell)
    generation = _generation_config(model, surgery, folder)
    if len(names) == 1:
        kwargs |= {"repo_id": repo_id, "generation_config": generation, "delta": deltas[names[0]]}
        write_donor(shells[names[0]], folder, is_main_process, states[names[0]], **kwargs)
        return
    require_donor_folder(folder)
    first = shells[names[0]].config  # all have the same base
    base = (first.base_model_name_or_path, first.base_revision, first.base_subfolder)
    entries = [write_entry(name, shells[name].config, surgery.organs[name].active, subfolder=name) for name in names]
    licenses = (License.of(shell.config) for shell in shells.values())
    config = composition_config(*base, surgery.base_config, entries, licenses)
    saved = [tensor for state in states.values() for tensor in state.values()]
    num_parameters = sum(tensor.numel() for tensor in saved)
    size = sum(tensor.numel() * tensor.element_size() for tensor in saved)
    with replacing(folder, is_main_process) as draft:
        digests: dict[str, str] = {}
        for name, shell in shells.items():
            place = os.path.join(folder, name)
            options = {"draft": os.path.join(draft, name), "delta": deltas[name], **kwargs}
            written = write_donor(shell, place, is_main_process, states[name], **options) or {}
            digests |= {f"{name}/{file}": value for file, value in written.items()}
        if is_main_process:
            if delta is not None:
                size = sum(file.stat().st_size for file in Path(draft).glob("*/*.safetensors"))
            card = updated_card(folder, config, num_parameters, size, repo_id)
            config.digests = digests or None
            config.save_pretrained(draft)
            card.save(Path(draft, README))
            if os.path.basename(folder).startswith(f"{PREFIX_CHECKPOINT_DIR}-"):
                _save_for_trainers(states, draft, folder)
            if generation is not None:
                save_generation_config(generation, draft)
            save_local_tokenizer(config, folder, draft)


def _cut_from(organ: Organ, shell: DonorModel) -> DonorConfig:
    """Return the config that says more of what an organ was cut from: its own, or that which names the recipient."""
    own, here = organ.config, shell.config
    names = [(config.base_model_name_or_path, config.base_subfolder) for config in (own, here)]
    is_recipient = own.base_revision is None and (own.base_model_name_or_path is None or names[0] == names[1])
    return here if is_recipient else own


def _save_for_trainers(
    states: Mapping[str, Mapping[str, torch.Tensor]], draft: str | os.PathLike[str], folder: str | os.PathLike[str]
) -> None:
    """Save the tensors of several organs in one file, too: trainers look for it when they resume or load the best."""
    tensors = {f"{name}.{key}": value.contiguous() for name, state in states.items() for key, value in state.items()}
    with full_disk_is_oserror(folder):
        save_file(tensors, Path(draft, SAFE_WEIGHTS_NAME), {"format": "pt"})


def _generation_config(
    model: PreTrainedModel, surgery: Surgery, folder: str | os.PathLike[str]
) -> GenerationConfig | None:
    """Return the organs' generation config if it is not the base's, or if `folder` has one, which may be outdated."""
    config = surgery.generation_configs.of_organs(model)
    is_saved = os.path.exists(os.path.join(folder, GENERATION_CONFIG_NAME))
    return config if is_saved or config != surgery.generation_config else None


def require_own_modules(surgery: Surgery, organ: Organ) -> None:
    """Check that no modules were added to an organ's layers.

    Raises:
        NotHFError: There are such modules (LoRA).
    """
    shell = _shell(surgery, organ)
    prefix = shell.stack.full_path
    names = {f"{prefix}.{key}" for key in organ.state()}
    _require_own(organ.name, names | dict(organ.saved.tensors()).keys(), shell)


def _require_own(name: str, keys: Collection[str], shell: DonorModel) -> None:
    if foreign := sorted(set(keys) ^ shell.state_dict().keys()):
        raise NotHFError(
            f"organ {name!r} has modules that are not its own ({foreign[0]}, …); merge or unload adapters (LoRA) first"
        )


def _shell(surgery: Surgery, organ: Organ, dtype: torch.dtype | None = None) -> DonorModel:
    """Build a `DonorModel` on the meta device, in the organ's dtype unless told; the recipient is its base."""
    config = copy.deepcopy(organ.config)
    before = organ.spec.config
    if organ.active and organ.learns() and drop_measured_before(config, before):
        warn_once(
            f"the metrics of organ {organ.name!r} are not saved: they were measured before it was loaded to be trained"
        )
    config.metrics = metrics_after_move(config, before)
    if name := surgery.base_config.name_or_path:
        is_same = surgery.is_live or surgery.base_subfolder == config.base_subfolder
        if surgery.base_revision or name != config.base_model_name_or_path or not is_same:
            config.base_revision, config.base_subfolder = surgery.base_revision, surgery.base_subfolder
        config.base_model_name_or_path = name
        for values in (config.base_config, config.organ_config):
            assert values is not None  # checked when the organ was loaded
            values |= {key: getattr(surgery.base_config, key) for key in VOCABULARY if key in values}
    if dtype is None:
        dtype = next(parameter.dtype for parameter in organ.parameters() if parameter.is_floating_point())
    with torch.device("meta"):
        shell = DonorModel(config)
    attach(shell, {name: tensor.detach().to("meta") for name, tensor in organ.saved.tensors()})
    for parameter in shell.parameters():
        parameter.data = parameter.data.to(dtype)
    return shell
