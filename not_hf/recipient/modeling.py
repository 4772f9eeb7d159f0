"""`Transplanted`: native models with organs.

A native model is extended in place by a dynamic subclass of its class, as in torch's `fully_shard`: its signature,
flags, state-dict keys, hooks and `isinstance` stay native. The subclass has the native name, which pipelines, trainers
and `config.architectures` use.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Self, Unpack, cast

import torch
from huggingface_hub import CommitInfo
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.adapters import has_adapters, stored_adapter
from not_hf.architecture.layers import own_configs
from not_hf.architecture.stack import require_head
from not_hf.architecture.upstream import (
    ADAPTER,
    IncompatibleKeys,
    attention_of,
    built_whole,
    commit_of,
    native_classes,
)
from not_hf.cards.license import inherited_licenses
from not_hf.composition.check import Fit, validate
from not_hf.composition.resolve import Resolved, resolve
from not_hf.composition.sources import DEFAULT_NAME, DonorLike, OrganSource
from not_hf.config import DonorConfig
from not_hf.donor.modeling import DonorModel
from not_hf.donor.saved_modules import Indices, class_names
from not_hf.errors import NotHFError, reading_base
from not_hf.hub.consistent_read import read_steadily
from not_hf.hub.push import PushOptions, push_folder
from not_hf.recipient.loading import Training, by_organ, fit_organs, load_donors
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.organ import Organ
from not_hf.recipient.saving import organ_tensors, save_organs
from not_hf.recipient.scaffold import load_scaffold, wants_scaffold
from not_hf.recipient.surgery import Surgery
from not_hf.recipient.trainer_card import keep_card_from_trainers


class Transplanted(Recipient):
    """Base class of `TransplantedForCausalLM` and of the classes for other heads."""

    config_class = DonorConfig  # for the Auto classes; the config of an instance is native
    native_auto_class: ClassVar[Any]  # loads the recipient

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel,
        donor: DonorLike | None = None,
        *,
        donor_name: str = DEFAULT_NAME,
        position: int | str | None = None,
        mode: str | None = None,
        donor_revision: str | None = None,
        donor_subfolder: str | None = None,
        is_trainable: bool = False,
        autocast_donor_dtype: bool = True,
        modules_to_save: Sequence[str] | None = None,
        trainable_token_indices: Indices | None = None,
        scaffold: str = "full",
        verify: bool = False,
        config: PreTrainedConfig | None = None,
        **base_kwargs: Any,
    ) -> Self:
        """Load a recipient and transplant an organ, or all organs of a composition, into it.

        Args:
            pretrained_model_name_or_path: With `donor`, the recipient: a folder, a Hub ID, or a live model, which is
                transplanted in place, with a copy of its config. Without `donor`, a donor repo, whose config names the
                base and its revision.
            donor: Donor folder, Hub ID or `DonorModel`, whose tensors are copied.
            donor_name: Name of the organ in the model.
            position: Position among the recipient's own layers; default: the donor's. `"best"`: where a sweep found it
                best, as `PositionSweep.record` noted it in the donor's config.
            mode: `"insert"` or `"replace"`; default: the donor's, or that of the best position.
            donor_revision: Branch, tag or commit of the donor repo.
            donor_subfolder: Folder of the donor within its repo.
            is_trainable: Make the organ's parameters trainable. All others are frozen.
            autocast_donor_dtype: Hold the weights of a trainable organ in float32 if the recipient is in float16 or
                bfloat16, in which most updates would be rounded away. The organ computes in the recipient's dtype.
            modules_to_save: Names of modules beside the layers that the organ holds, as in `DonorModel.from_base`,
                besides those of its donor. They start as those of the recipient.
            trainable_token_indices: Ids of tokens whose rows it holds, likewise.
            scaffold: `"minimal"` leaves out the recipient's own layers: only its embeddings, final norm and head are
                loaded, to train an organ when the whole recipient does not fit in memory. The saved organ can be
                loaded into the whole recipient. `"full"` loads the whole recipient.
            verify: Compare the donor's tensors with the digest in its config, which costs a pass over their bytes.
            config: Config of the first argument, if already loaded.
            **base_kwargs: For the recipient's `from_pretrained` (`dtype`, `device_map`, `revision`, …). `token`,
                `cache_dir`, `force_download` and `local_files_only` also apply to the donor. Without `donor`,
                `revision` and `subfolder` are those of the donor. A donor that was saved with `variant` is given as
                `DonorModel.from_pretrained(donor, variant=...)`.

        Returns:
            The native model with organs, in eval mode unless a live recipient was in train mode.

        Raises:
            NotHFError: An argument is out of range, no base is named, or there is no digest to verify.
            IncompatibleDonorError: Lists all mismatches, before weights are read.
            CorruptDonorError: The donor is damaged. As with any error, a live recipient is unchanged.
            OSError: A repo cannot be read.
        """
        is_scaffold = wants_scaffold(scaffold, pretrained_model_name_or_path, base_kwargs)
        source = OrganSource(donor_name, "", donor_revision, donor_subfolder, position, mode)
        first = pretrained_model_name_or_path
        live = first if isinstance(first, PreTrainedModel) else None
        present = list(live._surgery.organs.values()) if isinstance(live, Transplanted) else []

        def read() -> tuple[Resolved, Fit, list[DonorModel]]:
            resolved = resolve(first, donor, source, config, base_kwargs)
            fit = validate(resolved.organs, resolved.base_config, present)
            require_head(resolved.base_kwargs["config"] if live is None else live.config, cls.native_auto_class)
            if live is not None:
                cls._require_class(live)
            attention = base_kwargs.get("attn_implementation") or attention_of(resolved.base_config)
            return resolved, fit, load_donors(resolved.organs, attention, resolved.shared, verify)

        resolved, fit, donors = read_steadily(first if donor is None else donor, read)
        base, info = cls._load_base(resolved, is_scaffold) if live is None else (live, None)
        if isinstance(base, Transplanted):
            surgery = base._surgery
        else:
            commit, subfolder = (resolved.base_kwargs.get(key) for key in ("revision", "subfolder"))
            surgery = Surgery(base, commit_of(commit), subfolder or None, is_scaffold, is_live=live is not None)
        cache_dir = resolved.shared.get("cache_dir")
        chosen = (modules_to_save, trainable_token_indices)
        training = Training(is_trainable, is_trainable and autocast_donor_dtype, *chosen)
        organs = fit_organs(base, surgery, resolved.organs, donors, fit.differences, training, cache_dir)
        for organ in organs if {"id2label", "label2id"} & base_kwargs.keys() else ():
            organ.config.labels = organ.config.labels and class_names(base.config)
        if resolved.generation_config is not None:
            surgery.generation_configs.organs = resolved.generation_config
        model = cls._splice(base, surgery, organs)
        adapter = dict(base_kwargs.get("adapter_kwargs") or {})
        if name := adapter.pop(ADAPTER, None):
            model.load_adapter(name, adapter_kwargs={**resolved.shared, **adapter})
        return (model, info) if base_kwargs.get("output_loading_info") else model  # type: ignore[return-value]

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> Self:
        """Build a base and an organ with fresh weights, for the Auto class's `from_config` with a donor's config."""
        if not isinstance(config, DonorConfig):
            return super()._from_config(config, **kwargs)
        native = config.native_config("base_config")
        require_head(native, cls.native_auto_class)
        base = cls.native_auto_class.from_config(native, **kwargs)
        return cls.from_pretrained(base, DonorModel(copy.deepcopy(config)))

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        selected_donors: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        dtype: str | torch.dtype | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        delta: str | None = None,
        rank: int | None = None,
        **kwargs: Any,
    ) -> None:
        """Save organs only: one as a donor, several as a composition with a subfolder each.

        Args:
            save_directory: Folder. Other arguments are as in `DonorModel.save_pretrained`.
            selected_donors: Names of the organs to save; default: all.
            state_dict: Tensors of the whole model, if already gathered (as by `Trainer`).
            dtype: dtype of the files, or its name. `None`: that of each organ, float32 for one that is trained.
            delta: Store changes of the layers that each organ was cut from; `rank` is as there, too.

        Raises:
            NotHFError: `state_dict` lacks an organ, or a `variant` is given, which only a `DonorModel` is saved as.
        """
        names = self._selected(selected_donors)
        if variant := kwargs.get("variant"):
            raise NotHFError(
                f"models load organs from model.safetensors, so variant={variant!r} would not be found; leave it out, "
                "and choose the dtype of the files: dtype=torch.float16"
            )
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        push_kwargs: Any = {key: kwargs.pop(key) for key in PushOptions.__annotations__ if key in kwargs}
        # once, since all processes have to gather partitioned organs, and one of them pushes
        tensors = {name: organ_tensors(self, self._surgery, name, state_dict) for name in names}
        kwargs |= {"tensors": tensors, "dtype": dtype, "max_shard_size": max_shard_size}
        kwargs |= {"delta": delta, "rank": rank, "token": push_kwargs.get("token"), "is_pushed": push_to_hub}
        save_organs(self, self._surgery, names, save_directory, is_main_process=is_main_process, **kwargs)
        keep_card_from_trainers()
        if push_to_hub and is_main_process:
            self._push(repo_id, names, kwargs, push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        selected_donors: Sequence[str] | None = None,
        dtype: str | torch.dtype | None = None,
        max_shard_size: int | str = "5GB",
        delta: str | None = None,
        rank: int | None = None,
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push organs and cards as one commit. Arguments as in `save_pretrained` and `DonorModel.push_to_hub`."""
        of_files: dict[str, Any] = {"dtype": dtype, "max_shard_size": max_shard_size, "delta": delta, "rank": rank}
        of_files |= {"token": options.get("token"), "is_pushed": True}
        return self._push(repo_id, self._selected(selected_donors), of_files, options)

    def _push(self, repo_id: str, names: Sequence[str], of_files: dict[str, Any], options: PushOptions) -> CommitInfo:
        """Push what `save_organs` writes of these organs with the arguments `of_files`."""

        def save(folder: str, repo_id: str) -> None:
            save_organs(self, self._surgery, names, folder, repo_id=repo_id, **of_files)

        with inherited_licenses([self.donor_config[name] for name in names], options.get("token")):
            return push_folder(save, repo_id, self.model_tags, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> IncompatibleKeys:
        """As in torch; also loads a trainer's checkpoint of the organs, as `Trainer` does to resume."""
        states = by_organ(state_dict, list(self._surgery.organs))
        if states is None:
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        changes = [self._loading(self._surgery.organs[name], state, strict) for name, state in states.items()]

        def copy_all() -> None:
            for change in changes:
                change()

        self._surgery.at_scale_one(copy_all)
        return IncompatibleKeys([], [])

    def _loading(self, organ: Organ, state_dict: Mapping[str, Any], strict: bool) -> Callable[[], None]:
        """Check the tensors of an organ's checkpoint, and return what copies them into it."""
        spec = dataclasses.replace(organ.spec, config=organ.config)
        loaded, missing = DonorModel.load_tensors(spec, dict(state_dict), partial=not strict)

        def copy_tensors() -> None:
            for n, (layer, source) in enumerate(zip(organ.layers, loaded.stack.layers, strict=True)):
                place = f"{loaded.stack.full_path}.{n}."
                tensors = {key: value for key, value in source.state_dict().items() if place + key not in missing}
                layer.load_state_dict(tensors, strict=False)
            organ.saved.load(loaded.state_dict())

        return copy_tensors

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickle the native class and extend it again, since the dynamic class cannot be imported by name."""
        return _revive, type(self).__bases__, self.__getstate__()

    def _selected(self, donor_names: Sequence[str] | None) -> list[str]:
        """Return the names of the organs to save, in load order."""
        if names := self._named(list(self.donor_config) if donor_names is None else donor_names):
            return names
        raise NotHFError(
            "no organ is loaded or selected; to save a native model, unload() or merge_and_unload() first"
        )

    @classmethod
    def _require_class(cls, live: PreTrainedModel) -> None:
        """Check that a live recipient has the head of this class."""
        kinds = native_classes(cls.native_auto_class, live.config)
        if kinds and not isinstance(live, kinds):
            names = " or ".join(kind.__name__ for kind in kinds)
            raise NotHFError(
                f"{cls.__name__} takes a {names}, not a {type(live).__name__}; use the class for that head"
            )

    @classmethod
    def _load_base(cls, resolved: Resolved, is_scaffold: bool) -> tuple[PreTrainedModel, dict[str, Any]]:
        """Load a recipient, with transformers' `output_loading_info`."""
        base = str(resolved.base)
        kwargs = {key: value for key, value in resolved.base_kwargs.items() if key != "output_loading_info"}
        with reading_base(base, resolved.named_by), built_whole():
            if is_scaffold:
                return load_scaffold(base, **kwargs)
            # without adapter_kwargs the Auto class would request adapter_config.json from the Hub in any case
            kwargs |= {"output_loading_info": True, "adapter_kwargs": resolved.shared}
            model, info = cls.native_auto_class.from_pretrained(base, **kwargs)
        if has_adapters(model):
            raise stored_adapter(base)
        return model, info

    @classmethod
    def _splice(cls, base: PreTrainedModel, surgery: Surgery, organs: Sequence[Organ]) -> Self:
        """Extend a model in place, freeze it and splice organs into its stack; undo everything on failure."""

        def splice() -> None:
            if not isinstance(base, Transplanted):
                vars(base)["_surgery"] = surgery
                base.__class__ = _transplanted_class(cast(Any, cls), cast(Any, type(base)))
                base.requires_grad_(False)
                own_configs(base)
                # with a list, Trainer keeps the tags of our card
                base.model_tags = base.model_tags or []
            surgery.organs |= {organ.name: organ for organ in organs}

        surgery.change(base, splice, flags=True)
        return cast(Self, base)


@functools.cache
def _transplanted_class(kind: Any, native: Any) -> Any:
    """Return the subclass of `kind` (a class of `heads`, or a subclass made here) and `native`."""
    kind = next(each for each in kind.__mro__ if "native_auto_class" in vars(each))
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    return type(native.__name__, (kind, native), {**names, "config_class": native.config_class})


def _revive(kind: type[Transplanted], native: type) -> Transplanted:
    cls = _transplanted_class(cast(Any, kind), native)
    return cls.__new__(cls)
