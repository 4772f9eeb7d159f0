"""`Recipient`: the life of organs in a native model: loading, choosing, switching off, taking out, merging."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from not_hf.architecture.quantization import dequantized, is_quantized, quantization_name
from not_hf.architecture.scaling import require_scalable, scale_problem
from not_hf.architecture.upstream import forget_conversions
from not_hf.composition.check import validate
from not_hf.composition.layout import require_free_names
from not_hf.composition.resolve import resolve_organ
from not_hf.composition.sources import DonorLike, OrganSource
from not_hf.config import DonorConfig
from not_hf.donor.averaging import combined, combined_config
from not_hf.errors import IncompatibleDonorError, NotHFError, some
from not_hf.recipient.loading import load_organs
from not_hf.recipient.organ import Organ
from not_hf.recipient.saving import require_own_modules
from not_hf.recipient.status import DonorStatus, donor_status
from not_hf.recipient.surgery import Surgery

if TYPE_CHECKING:
    _Native = PreTrainedModel  # each instance is of a native class as well
else:
    _Native = object


class Recipient(_Native):
    """What a native model can do besides when it carries organs. Mixed into its class by `transplant`."""

    _surgery: Surgery

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
        donor: DonorLike,
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
        surgery = self._surgery
        organ = resolve_organ(OrganSource(donor_name, donor, revision, subfolder, position, mode), hub_kwargs)
        fit = validate([organ], surgery.base_config, list(surgery.organs.values()))
        (loaded,) = load_organs(self, surgery, [organ], fit.differences, is_trainable, hub_kwargs)
        with surgery.changing(self):
            surgery.organs[donor_name] = loaded

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

    def set_donor_scale(self, donor_name: str, scale: float) -> None:
        """Multiply what each layer of an inserted organ writes to the residual stream.

        The number goes into its output projections in place, so it costs nothing at run time and any scale merges.
        Saving keeps the weights as they are without it, and the scale in the config. An organ that is trained at
        another scale than 1 gets weights divided by it.

        Args:
            donor_name: Of a loaded organ, active or not.
            scale: 1 is the organ as it was trained, 0 a no-op.

        Raises:
            NotHFError: The name is not loaded, the scale is no finite number, or the organ was trained at scale 0.
            IncompatibleDonorError: The organ replaces layers.
            UnsupportedArchitectureError: The layers do not follow a scale: a norm behind their projections undoes it.
        """
        (name,) = self._named([donor_name])
        organ = self._surgery.organs[name]
        if problem := scale_problem(scale, organ.config.mode):
            error = IncompatibleDonorError if organ.config.mode != "insert" else NotHFError
            raise error(f"organ {name!r}: {problem}")
        require_own_modules(self._surgery, organ)
        if scale != 1:
            require_scalable(self._surgery.stack(self), organ.layers[0])
        organ.rescale(float(scale))

    def hotswap_donor(
        self,
        donor_name: str,
        donor: DonorLike,
        revision: str | None = None,
        subfolder: str | None = None,
        **hub_kwargs: Any,
    ) -> None:
        """Put another organ's weights into a loaded organ's tensors: nothing is rebuilt, nothing recompiled.

        Name, position, mode, scale and `requires_grad` flags stay; the config is the new organ's otherwise.

        Args:
            donor_name: Of the loaded organ.
            donor: Donor folder, Hub ID or `DonorModel`, of the same span and shapes.
            revision: Branch, tag or commit of the donor repo.
            subfolder: Folder of the donor within its repo.
            **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only`.

        Raises:
            IncompatibleDonorError: It is of another span, or its layers are built otherwise; nothing is changed.
            CorruptDonorError: Its files are off; nothing is changed.
        """
        (name,) = self._named([donor_name])
        old, surgery = self._surgery.organs[name], self._surgery
        require_own_modules(surgery, old)
        place = (old.config.position, old.config.mode, 1.0, old.active)
        organ = resolve_organ(OrganSource(name, donor, revision, subfolder, *place), hub_kwargs)
        validate([organ], surgery.base_config, [each for each in surgery.organs.values() if each is not old])
        (new,) = load_organs(self, surgery, [organ], [], False, hub_kwargs)
        if differences := surgery.swap_differences(old, new):
            raise IncompatibleDonorError(f"organ {name!r} cannot be swapped for another kind: {some(differences)}")
        old.take_over(new)

    def add_weighted_donor(
        self,
        donors: Sequence[str],
        weights: Sequence[float] | None,
        donor_name: str,
        combination_type: str = "linear",
    ) -> None:
        """Average loaded organs of one span into a new one, frozen and not active until `set_donor` names it.

        Args:
            donors: Names of two or more loaded organs. The new one goes where the first one goes, with scale 1.
            weights: One number each; they count relative to their sum. `None`: equal.
            donor_name: Of the new organ.
            combination_type: `"linear"`, or `"slerp"` for two of them.

        Raises:
            IncompatibleDonorError: They are not of one span, or their layers differ.
            NotHFError: A name is not loaded or taken, something was put on top of an organ (LoRA), or another
                argument is out of range.
        """
        surgery, unknown = self._surgery, [name for name in donors if name not in self._surgery.organs]
        self._named(unknown)
        require_free_names([donor_name], list(surgery.organs))
        chosen = [surgery.organs[name] for name in donors]
        for organ in chosen:
            require_own_modules(surgery, organ)
        states = [
            {
                f"{n}.{key}": organ.at_scale_one(f"{n}.{key}", tensor)
                for n, layer in enumerate(organ.layers)
                for key, tensor in layer.state_dict().items()
            }
            for organ in chosen
        ]
        tensors = combined(states, weights, combination_type)
        config = combined_config([organ.config for organ in chosen])
        layers = nn.ModuleList(copy.deepcopy(layer) for layer in chosen[0].layers)
        layers.load_state_dict(tensors)
        layers.requires_grad_(False)
        with surgery.changing(self):
            surgery.organs[donor_name] = Organ(donor_name, config, config.check(), list(layers), active=False)

    def get_donor_status(self) -> dict[str, DonorStatus]:
        """Every loaded organ by name, in load order: where it stands, its scale, what of it is trainable, …"""
        surgery = self._surgery
        places = {id(layer): n for n, layer in enumerate(surgery.stack(self).layers)}
        return {
            name: donor_status(organ, [places[id(layer)] for layer in organ.layers if id(layer) in places])
            for name, organ in surgery.organs.items()
        }

    def delete_donor(self, donor_name: str) -> None:
        """Take an organ out for good; the others stay as if it had never been there."""
        (name,) = self._named([donor_name])
        with self._surgery.changing(self):
            del self._surgery.organs[name]

    def unload(self) -> PreTrainedModel:
        """Take every organ out and give the native model back, its class, config and flags restored.

        Raises:
            NotHFError: It is a scaffold.
        """
        self._require_layers("unload")
        surgery = self._surgery
        with surgery.changing(self):
            surgery.organs = {}
        surgery.release(self)
        return self._release()

    def merge_and_unload(self, dequantize: bool = False) -> PreTrainedModel:
        """Make the active organs a plain part of the native model, which then saves and loads without not_hf.

        Args:
            dequantize: Make the weights of a quantized recipient plain, which takes the memory they have then.

        Raises:
            NotHFError: The recipient is quantized, and `dequantize` was not asked for or is not to be had; or it is a
                scaffold.
            IncompatibleDonorError: A native model of the spliced config would compute something else; it names every
                difference, and nothing is changed.
        """
        self._require_layers("merge_and_unload")
        surgery = self._surgery
        chosen = [organ for organ in surgery.organs.values() if organ.active]  # also inside disable_donors()
        if not chosen:
            return self.unload()
        packed = is_quantized(self)
        if packed and not dequantize:
            raise NotHFError(
                f"the recipient is quantized ({quantization_name(self)}) and an organ is not: type "
                "merge_and_unload(dequantize=True) to make all weights plain, or save_pretrained() the organ alone"
            )
        with dequantized(self):
            if differences := surgery.differences(surgery.plan(chosen)):
                raise IncompatibleDonorError(f"a native model cannot hold these layers: {some(differences)}")
        if packed:  # packed weights cannot be trained, plain ones can
            surgery.requires_grad = dict.fromkeys(surgery.requires_grad, True)
        with self.disable_donors():
            surgery.release(self)
        with surgery.changing(self):
            surgery.disabled = 0
        for organ in chosen:
            organ.set_trainable(True)
        forget_conversions(self)
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

    def _named(self, names: str | Sequence[str]) -> list[str]:
        """Names of loaded organs, in load order."""
        organs = self._surgery.organs
        chosen = [names] if isinstance(names, str) else list(names)
        if unknown := [str(name) for name in chosen if name not in organs]:
            raise NotHFError(f"no donor named {', '.join(unknown)}; loaded are {', '.join(organs) or 'none'}")
        return [name for name in organs if name in chosen]

    def _require_layers(self, what: str) -> None:
        """Refuse what gives out the native model, where that has no layers of its own."""
        if self._surgery.is_scaffold:
            raise NotHFError(
                f"{what}() needs the base's own layers, which scaffold='minimal' left out; save_pretrained() the "
                "organ and load it into the whole base: from_pretrained(base, folder)"
            )

    def _release(self) -> PreTrainedModel:
        """Back to the native class."""
        native = self._surgery.native_class
        del self._surgery
        if not self.model_tags:
            vars(self).pop("model_tags", None)
        self.__class__ = native  # type: ignore[assignment]
        return self

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Recipient:
        """`to()`, `half()`, … reach the layers that are not in the stack as well."""
        with self._surgery.at_scale_one():
            super()._apply(fn, recurse)
            if recurse:
                for layer in self._surgery.parked(self):
                    layer._apply(fn)
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy made inside `disable_donors()` is outside of that block, so its stack may be another."""
        super().__setstate__(state)
        self._surgery.apply(self)
