"""`TransplantedForCausalLM`: a native causal LM that carries organs.

The native model is extended in place by a dynamic subclass of its own class, as torch's `fully_shard` does: signature,
flags, state-dict keys, hooks and `isinstance` stay native. The class keeps the native name, because pipelines,
trainers and `config.architectures` go by it; `isinstance(model, TransplantedForCausalLM)` tells it apart.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Unpack, cast

import torch
from huggingface_hub import CommitInfo
from torch import nn
from torch.nn.modules.module import _IncompatibleKeys
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from not_hf.anatomy import (
    DENSE_PREFIXES,
    LAYER_INDEX_LISTS,
    LAYERLESS,
    PER_LAYER_LISTS,
    PERIODS,
    config_differences,
)
from not_hf.bases import reading_base
from not_hf.compatibility import require_compatibility
from not_hf.composition import place_in_force, read_config, require_stack, resolve_request
from not_hf.config import DonorConfig
from not_hf.cutting import resolve_commit
from not_hf.donor import DonorModel
from not_hf.entries import DEFAULT_NAME, DonorSource, OrganSource, is_plain_name
from not_hf.errors import IncompatibleDonorError, NotHFError, some
from not_hf.layers import require_finite, settle
from not_hf.license import inherit_license
from not_hf.saving import save_organs
from not_hf.sharing import PushOptions, push_folder
from not_hf.splice import Organ, Surgery
from not_hf.vocabulary import Home, vocabulary_differences

logger = logging.getLogger(__name__)

if TYPE_CHECKING:
    _Native = PreTrainedModel  # each instance is of a native class as well
else:
    _Native = object


class TransplantedForCausalLM(_Native):
    """A causal LM with organs. Made by `from_pretrained`, never by its constructor.

    Besides what follows, an instance is a full model of its native class (`LlamaForCausalLM`, …).
    """

    config_class = DonorConfig  # what AutoModelForCausalLM goes by; instances have their native config
    _surgery: Surgery

    @classmethod
    def from_pretrained(  # type: ignore[override]
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str] | PreTrainedModel,
        donor: DonorSource | None = None,
        *,
        donor_name: str = DEFAULT_NAME,
        position: int | None = None,
        mode: str | None = None,
        donor_revision: str | None = None,
        donor_subfolder: str | None = None,
        is_trainable: bool = False,
        config: PreTrainedConfig | None = None,
        **base_kwargs: Any,
    ) -> TransplantedForCausalLM:
        """Load a recipient and put an organ into it.

        Args:
            pretrained_model_name_or_path: Recipient (folder, Hub ID, or a live model, which is transplanted in place)
                when `donor` is given; otherwise a donor repo, whose config names the base and its revision.
            donor: Donor folder, Hub ID or `DonorModel` (which stays the caller's: its tensors are copied in).
            donor_name: Name of the organ in this model.
            position: Counts the recipient's own layers; `None`: as the donor says.
            mode: `"insert"` or `"replace"`; `None`: as the donor says.
            donor_revision: Branch, tag or commit of the donor repo.
            donor_subfolder: Folder of the donor within its repo.
            is_trainable: Make the organ's parameters trainable. Everything else is frozen either way.
            config: Config of the repo named first, when already loaded.
            **base_kwargs: For the recipient's `from_pretrained` (`dtype`, `device_map`, `revision`, …). `token`,
                `cache_dir`, `force_download`, `local_files_only` hold for the donor too. Without `donor`, `revision`
                and `subfolder` are the donor repo's.

        Returns:
            The native model, extended. It is in eval mode, unless a live recipient was training.

        Raises:
            IncompatibleDonorError: With every mismatch, before weights are read.
            CorruptDonorError: The donor's files are off. A live recipient is then as it was.
            OSError: A repo cannot be read.
        """
        request = resolve_request(
            pretrained_model_name_or_path,
            donor,
            OrganSource(donor_name, "", donor_revision, donor_subfolder, position, mode),
            config,
            base_kwargs,
        )
        base = request.base
        if not isinstance(base, PreTrainedModel) or len(request.sources) > 1:  # one is checked when it goes in
            organs = [(source, read_config(source, request.shared)) for source in request.sources]
            require_stack(organs, request.base_config())
        if isinstance(base, PreTrainedModel):
            return _transplant(base, request.sources, is_trainable, request.shared)
        wants_info = request.base_kwargs.pop("output_loading_info", False)
        with reading_base(base, request.named_by):
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                base,
                output_loading_info=True,
                adapter_kwargs=request.shared,  # else it asks the Hub for an adapter_config.json, come what may
                **request.base_kwargs,
            )
        native, info = loaded
        revision = getattr(request.base_kwargs.get("revision"), "resolved", None)
        subfolder = request.base_kwargs.get("subfolder") or None
        model = _transplant(native, request.sources, is_trainable, request.shared, revision, subfolder)
        return (model, info) if wants_info else model  # type: ignore[return-value]

    @classmethod
    def _from_config(cls, config: PreTrainedConfig, **kwargs: Any) -> TransplantedForCausalLM:
        """What `AutoModelForCausalLM.from_config` calls: for a donor's config, base and organ with fresh weights."""
        if not isinstance(config, DonorConfig):
            return super()._from_config(config, **kwargs)
        base = AutoModelForCausalLM.from_config(config.native_config("base_config"), **kwargs)
        return _transplant(base, [OrganSource(DEFAULT_NAME, DonorModel(copy.deepcopy(config)))], False, {})

    # ------------------------------------------------------------------ organs

    @property
    def active_donors(self) -> list[str]:
        """Names of the organs that take part in `forward`, in load order."""
        return self._surgery.active

    @property
    def base_config(self) -> PreTrainedConfig:
        """Config of the recipient without its organs."""
        return self._surgery.base_config

    @property
    def donor_config(self) -> dict[str, DonorConfig]:
        """Config of each loaded organ by name; `position` and `mode` are those in force here."""
        return {name: organ.config for name, organ in self._surgery.organs.items()}

    def load_donor(
        self,
        donor: DonorSource,
        donor_name: str,
        position: int | None = None,
        mode: str | None = None,
        is_trainable: bool = False,
        revision: str | None = None,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Put one more organ in and make it active beside those that are. Arguments as in `from_pretrained`.

        Raises:
            IncompatibleDonorError: It does not fit the recipient, or overlaps an active organ; nothing is changed.
            CorruptDonorError: Its files are off; nothing is changed.
        """
        source = OrganSource(donor_name, donor, revision, subfolder, position, mode)
        self._load(source, is_trainable, hub_kwargs)

    def set_donor(self, donor_names: str | Sequence[str]) -> None:
        """Make exactly these organs active; their order in the stack is the order they were loaded in.

        Raises:
            NotHFError: A name is not loaded.
            IncompatibleDonorError: They overlap; nothing is changed.
        """
        names, surgery = self._named(donor_names), self._surgery
        surgery.plan([organ for name, organ in surgery.organs.items() if name in names])
        with surgery.changing(self):
            for name, organ in surgery.organs.items():
                organ.active = name in names

    @contextlib.contextmanager
    def disable_donors(self) -> Iterator[None]:
        """The base, bit for bit, inside the `with` block. May be nested; an exception inside does no harm."""
        surgery = self._surgery
        with surgery.changing(self):
            surgery.disabled += 1
        try:
            yield
        finally:
            if vars(self).get("_surgery") is surgery:  # else it was unloaded or merged inside the block
                with surgery.changing(self):
                    surgery.disabled -= 1

    def delete_donor(self, donor_name: str) -> None:
        """Take an organ out for good; the others stay as if it had never been there."""
        self._named(donor_name)
        with self._surgery.changing(self):
            del self._surgery.organs[donor_name]

    def unload(self) -> PreTrainedModel:
        """Take every organ out and give the native model back, its class, config and flags restored."""
        surgery = self._surgery
        with surgery.changing(self):
            surgery.organs = {}
        surgery.release(self)
        return self._release()

    def merge_and_unload(self) -> PreTrainedModel:
        """Make the active organs a plain part of the native model, which then saves and loads without not_hf.

        Raises:
            IncompatibleDonorError: A native model of the spliced config would compute something else; it names every
                difference, and nothing is changed.
        """
        surgery = self._surgery
        chosen = [organ for organ in surgery.organs.values() if organ.active]  # also inside disable_donors()
        if not chosen:
            return self.unload()
        if differences := surgery.differences(surgery.plan(chosen)):
            raise IncompatibleDonorError(f"a native model cannot hold these layers: {some(differences)}")
        with self.disable_donors():
            surgery.release(self)
        with surgery.changing(self):
            surgery.disabled = 0
        for layer in (layer for organ in chosen for layer in organ.layers):
            layer.requires_grad_(True)
        # how transformers converted the files it loaded; undoing it would save dequantized weights as quantized ones
        vars(self).pop("_weight_conversions", None)
        return self._release()

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; `base_config` follows."""
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        self._surgery.base_config.vocab_size = self.config.vocab_size
        return embeddings

    def get_base_model(self) -> PreTrainedModel:
        """The same modules behind a handle of the native class; as in PEFT, active organs stay in."""
        view = self._surgery.native_class.__new__(self._surgery.native_class)
        view.__dict__ = {key: value for key, value in self.__dict__.items() if key != "_surgery"}
        return view

    def get_nb_trainable_parameters(self) -> tuple[int, int]:
        """Number of trainable parameters and of all parameters."""
        sizes = [(p.numel(), p.requires_grad) for p in self.parameters()]
        return sum(n for n, trainable in sizes if trainable), sum(n for n, _ in sizes)

    def print_trainable_parameters(self) -> None:
        """Print how much is trainable, as PEFT does."""
        trainable, total = self.get_nb_trainable_parameters()
        print(
            f"trainable params: {trainable:,d} || all params: {total:,d} || trainable%: {100 * trainable / total:.4f}"
        )

    # ------------------------------------------------------------- save and load

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        selected_donors: Sequence[str] | None = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, torch.Tensor] | None = None,
        push_to_hub: bool = False,
        max_shard_size: int | str = "5GB",
        **kwargs: Any,
    ) -> None:
        """Save organs only: one as a donor repo, several as a composition with a subfolder each.

        Args:
            save_directory: Folder; created when missing.
            selected_donors: Names of the organs to save; `None` means all that are loaded.
            is_main_process: Write on this process.
            state_dict: The whole model's tensors, when they were gathered elsewhere (as `Trainer` does).
            push_to_hub: Push afterwards to `repo_id` (default: the folder's name).
            max_shard_size: Past this size an organ's weights are sharded.
        """
        names = self._named(selected_donors)
        if not names:
            raise NotHFError("no organ is loaded; use merge_and_unload() or unload() to save a native model")
        repo_id = kwargs.pop("repo_id", os.path.basename(os.path.abspath(save_directory)))
        push_kwargs = {key: kwargs.pop(key) for key in PushOptions.__annotations__ if key in kwargs}
        options = {"is_main_process": is_main_process, "max_shard_size": max_shard_size, **kwargs}
        save_organs(self, self._surgery, names, save_directory, state_dict=state_dict, **options)
        if push_to_hub:
            self.push_to_hub(repo_id, selected_donors=names, max_shard_size=max_shard_size, **push_kwargs)

    def push_to_hub(  # type: ignore[override]
        self,
        repo_id: str,
        *,
        selected_donors: Sequence[str] | None = None,
        max_shard_size: int | str = "5GB",
        **options: Unpack[PushOptions],
    ) -> CommitInfo:
        """Push the organs and their cards as one commit. Arguments as in `PreTrainedModel.push_to_hub`.

        Raises:
            NotHFError: The repo holds another kind of model.
            OSError: The Hub refuses, or cannot be reached; the repo is as it was.
        """
        names = self._named(selected_donors)
        for config in (self.donor_config[name] for name in names):
            inherit_license(config, revision=config.base_revision, token=options.get("token"))

        def save(folder: str, repo_id: str) -> None:
            save_organs(self, self._surgery, names, folder, repo_id=repo_id, max_shard_size=max_shard_size)

        return push_folder(save, repo_id, self.model_tags, **options)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> _IncompatibleKeys:
        """As in torch; also takes what `save_pretrained` wrote for the one loaded organ: `Trainer` hands it back."""
        if not state_dict or not all(key.startswith(f"{DonorModel.base_model_prefix}.") for key in state_dict):
            return super().load_state_dict(state_dict, strict=strict, assign=assign)
        if len(self._surgery.organs) != 1:
            raise NotHFError("an organ's checkpoint fits a model with exactly one organ; use load_donor")
        (organ,) = self._surgery.organs.values()
        loaded, missing = DonorModel.load_tensors(organ.config, dict(state_dict), partial=not strict)
        for n, (layer, source) in enumerate(zip(organ.layers, loaded.stack.layers, strict=True)):
            place = f"{loaded.stack.full_path}.{n}."
            tensors = {key: value for key, value in source.state_dict().items() if place + key not in missing}
            layer.load_state_dict(tensors, strict=False)
        return _IncompatibleKeys([], [])

    # ------------------------------------------------------------------ plumbing

    def _named(self, names: str | Sequence[str] | None) -> list[str]:
        """Names of loaded organs, all of them for `None`."""
        organs = self._surgery.organs
        chosen = list(organs) if names is None else [names] if isinstance(names, str) else list(names)
        if unknown := [str(name) for name in chosen if name not in organs]:
            raise NotHFError(f"no donor named {', '.join(unknown)}; loaded are {', '.join(organs) or 'none'}")
        return [name for name in organs if name in chosen]

    def _load(self, source: OrganSource, is_trainable: bool, hub_kwargs: Mapping[str, Any]) -> None:
        """Load one organ; everything about it is checked before the model changes."""
        surgery, name, donor = self._surgery, source.name, source.donor
        repo = None if isinstance(donor, DonorModel) else str(donor)
        if not is_plain_name(name) or name in surgery.organs:
            raise NotHFError(f"donor_name {name!r} is taken or not a plain name; choose another")
        if repo is not None:
            source = replace(source, revision=resolve_commit(repo, {**hub_kwargs, "revision": source.revision}))
        config = copy.deepcopy(read_config(source, hub_kwargs))
        require_compatibility(config, surgery.base_config, source.position, source.mode)
        config.position, config.mode = place_in_force(source, config)
        layers = self._organ_layers(source, config.position, is_trainable, hub_kwargs)
        organ = Organ(name, config, layers, source.active, repo, getattr(source.revision, "resolved", None))
        beside = [other for other in surgery.organs.values() if other.active and source.active]
        if differences := surgery.differences(surgery.plan([*beside, organ])):
            logger.warning("organ %r works here but cannot be merged into a native model: %s", name, some(differences))
        if others := [d for d in config_differences(organ.native_config, surgery.base_config) if _computes(d)]:
            logger.warning("organ %r was cut under another config; here its %s", name, some(others))
        there = None if isinstance(donor, DonorModel) else Home(donor, source.revision, source.subfolder)
        here = Home(self.config.name_or_path, surgery.base_revision, surgery.base_subfolder)
        if others := vocabulary_differences(config, self.config, there, here, hub_kwargs.get("cache_dir")):
            logger.warning("organ %r was made with another vocabulary, and loads all the same: %s", name, some(others))
        with surgery.changing(self):
            surgery.organs[name] = organ

    def _organ_layers(
        self, source: OrganSource, position: int, is_trainable: bool, hub_kwargs: Mapping[str, Any]
    ) -> list[nn.Module]:
        """Layers of an organ that are this model's own, in the dtype and on the device of those at `position`."""
        base_layers, donor = self._surgery.base_layers, source.donor
        neighbour = base_layers[min(position, len(base_layers) - 1)]
        if any(parameter.is_meta for parameter in neighbour.parameters()):
            raise NotHFError("the recipient is offloaded to disk or CPU; load it without offloading first")
        if isinstance(donor, DonorModel):
            layers = [copy.deepcopy(layer) for layer in donor.stack.layers]
        else:
            loaded = DonorModel.from_pretrained(
                donor,
                dtype=next(p.dtype for p in neighbour.parameters() if p.is_floating_point()),
                attn_implementation=self.config._attn_implementation,
                revision=source.revision,
                subfolder=source.subfolder or "",
                **hub_kwargs,
            )
            layers = list(loaded.stack.layers)
        for layer in layers:
            settle(layer, neighbour, is_trainable)
        require_finite(layers, source.name)
        return layers

    def _release(self) -> PreTrainedModel:
        """Back to the native class."""
        native = self._surgery.native_class
        del self._surgery
        if not self.model_tags:
            vars(self).pop("model_tags", None)
        self.__class__ = native  # type: ignore[assignment]
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> TransplantedForCausalLM:
        """`to()`, `half()`, … reach the layers that are not in the stack as well."""
        super()._apply(fn, recurse)
        if recurse:
            for layer in self._surgery.parked(self):
                layer._apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy made inside `disable_donors()` is outside of that block."""
        super().__setstate__(state)
        if self._surgery.disabled:
            with self._surgery.changing(self):
                self._surgery.disabled = 0

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """The dynamic class cannot be found by name: pickle the native one and extend it again."""
        return _revive, (self._surgery.native_class,), self.__dict__


def _computes(difference: str) -> bool:
    """Whether a difference of configs may change what layers compute: some read the recipient's config as they run."""
    key = difference.partition(" ")[0]
    spliced = {"num_hidden_layers", *PER_LAYER_LISTS, *LAYER_INDEX_LISTS, *DENSE_PREFIXES, *PERIODS}
    return key not in spliced | LAYERLESS and "dropout" not in key and not key.endswith("_token_id")


@functools.cache
def _transplanted_class(native: Any) -> type[TransplantedForCausalLM]:
    names = {"__module__": native.__module__, "__qualname__": native.__qualname__, "__doc__": native.__doc__}
    return type(native.__name__, (TransplantedForCausalLM, native), {**names, "config_class": native.config_class})


def _revive(native: type) -> TransplantedForCausalLM:
    cls = _transplanted_class(native)
    return cls.__new__(cls)


def _transplant(
    base: PreTrainedModel,
    sources: Sequence[OrganSource],
    is_trainable: bool,
    hub_kwargs: Mapping[str, Any],
    base_revision: str | None = None,
    base_subfolder: str | None = None,
) -> TransplantedForCausalLM:
    """Extend a model in place, freeze it and load organs; undo everything on failure."""
    fresh = not isinstance(base, TransplantedForCausalLM)
    if fresh:
        surgery = Surgery(base, base_revision, base_subfolder)
        native: Any = type(base)
        base.__class__ = _transplanted_class(native)
        base.requires_grad_(False)
        # Trainer's card keeps the tags of ours if there is a list to add them to
        base.model_tags = base.model_tags or []
        cast(TransplantedForCausalLM, base)._surgery = surgery
    model = cast(TransplantedForCausalLM, base)
    before = list(model.donor_config)
    try:
        for source in sources:
            model._load(source, is_trainable, hub_kwargs)
    except BaseException:
        for name in [name for name in model.donor_config if name not in before]:
            model.delete_donor(name)
        if fresh:
            model.unload()
        raise
    return model
