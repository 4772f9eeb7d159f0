"""`Recipient`: methods of a native model to load, select, disable, scale, swap, delete and merge organs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Sequence
from typing import Any, Self

import torch
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.adapters import has_adapters
from not_hf.architecture.file_layout import forget_conversions
from not_hf.architecture.master_weights import MasterWeights
from not_hf.architecture.quantization import dequantized, is_quantized, quantization_name
from not_hf.architecture.scaling import scale_problem
from not_hf.architecture.stack import layers_config
from not_hf.cards.common import warn_once
from not_hf.composition.layout import require_free_names
from not_hf.composition.sources import DonorLike, OrganSource
from not_hf.donor.averaging import BaseLike, Combination
from not_hf.donor.saved_modules import Indices
from not_hf.errors import IncompatibleDonorError, NotHFError, some
from not_hf.recipient.averaging import average
from not_hf.recipient.filled_cache import FilledCache
from not_hf.recipient.loading import Training, fit_organs, read_donor
from not_hf.recipient.organ import Organ, swap_differences
from not_hf.recipient.prefill import take_next
from not_hf.recipient.saving import require_own_modules
from not_hf.recipient.views import ModelWithOrgans
from not_hf.recipient.without_donors import WithoutDonors


class Recipient(ModelWithOrgans):
    """A native model with organs: mixed into the native class of a model."""

    def load_donor(
        self,
        donor: DonorLike,
        donor_name: str,
        position: int | str | None = None,
        mode: str | None = None,
        is_trainable: bool = False,
        autocast_donor_dtype: bool = True,
        modules_to_save: Sequence[str] | None = None,
        trainable_token_indices: Indices | None = None,
        revision: str | None = None,
        subfolder: str | None = None,
        verify: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        """Load another organ and activate it beside the active ones. Arguments as in `from_pretrained`.

        Raises:
            IncompatibleDonorError: The organ does not fit the recipient, or overlaps an active organ.
            CorruptDonorError: The donor is damaged. As with any error, the model is unchanged.
        """
        surgery, cache_dir = self._surgery, hub_kwargs.get("cache_dir")
        source = OrganSource(donor_name, donor, revision, subfolder, position, mode)
        organ, donors, differences = read_donor(self, surgery, source, surgery.organs.values(), hub_kwargs, verify)
        chosen = (modules_to_save, trainable_token_indices)
        training = Training(is_trainable, is_trainable and autocast_donor_dtype, *chosen)
        (loaded,) = fit_organs(self, surgery, [organ], donors, differences, training, cache_dir)
        surgery.change(self, lambda: surgery.add(loaded))

    def set_donor(self, donor_names: str | Sequence[str]) -> None:
        """Activate exactly these organs. At one position, they stay in load order.

        Raises:
            NotHFError: There is no organ of that name.
            IncompatibleDonorError: The organs overlap; the model is unchanged.
        """
        names, surgery = self._named(donor_names), self._surgery
        surgery.plan([organ for name, organ in surgery.organs.items() if name in names])

        def activate() -> None:
            for name, organ in surgery.organs.items():
                organ.active = name in names

        surgery.change(self, activate)

    def disable_donors(self) -> contextlib.AbstractContextManager[None]:
        """Run the base without organs, bit for bit, inside the `with` block, which may be nested."""
        return WithoutDonors(self, self._surgery)

    def set_donor_scale(self, donor_name: str, scale: float) -> None:
        """Scale the contribution of an inserted organ's layers to the residual stream, or what replacement changes.

        The output projections of an inserted organ are multiplied. Weights that replace others become
        `recipient + scale * (organ - recipient)`. Both happens in place, so a scale costs nothing at run time and any
        scale can be merged. Saving writes the unscaled weights, and the scale in the config. Modules beside the layers
        are not scaled. While a replacement has another scale than 1, it takes its memory twice.

        Args:
            donor_name: Name of a loaded organ, active or not.
            scale: A finite number. 1 is the organ as trained, bit for bit; 0 a no-op, or the recipient bit for bit.

        Raises:
            NotHFError: There is no organ of that name, the scale is not finite, or the organ was trained at scale 0.
            IncompatibleDonorError: The organ replaces layers that are quantized, offloaded or of another structure.
            UnsupportedArchitectureError: A norm after the output projections undoes the scale of an inserted organ.
        """
        (name,) = self._named([donor_name])
        organ = self._surgery.organs[name]
        if problem := scale_problem(scale):
            raise NotHFError(f"organ {name!r}: {problem}")
        require_own_modules(self._surgery, organ)
        if scale != 1:
            organ.require_scalable(self._surgery.stack(self))
        changes = self._surgery.changes
        changes.make(lambda: organ.rescale(float(scale), changes), lambda: None)  # undone within

    def hotswap_donor(
        self,
        donor_name: str,
        donor: DonorLike,
        revision: str | None = None,
        subfolder: str | None = None,
        verify: bool = False,
        **hub_kwargs: Any,
    ) -> None:
        """Copy a donor's weights into the tensors of a loaded organ, without rebuilding or recompiling the model.

        Name, position, mode, scale and `requires_grad` flags stay; the rest of the config is the donor's.

        Args:
            donor_name: Name of the loaded organ.
            donor: A donor of the same span and shapes; the other arguments are as in `load_donor`.

        Raises:
            IncompatibleDonorError: The donor has another span, or layers of another structure.
            CorruptDonorError: The donor is damaged. As with any error, the model is unchanged.
        """
        (name,) = self._named([donor_name])
        old, surgery = self._surgery.organs[name], self._surgery
        require_own_modules(surgery, old)
        place = (old.config.position, old.config.mode, 1.0, old.active)
        source = OrganSource(name, donor, revision, subfolder, *place)
        others = [each for each in surgery.organs.values() if each is not old]
        organ, donors, _ = read_donor(self, surgery, source, others, hub_kwargs, verify)
        training = Training(old.saved.holds_rows_apart, isinstance(old.layers[0], MasterWeights))
        (new,) = fit_organs(self, surgery, [organ], donors, [], training, hub_kwargs.get("cache_dir"))
        if differences := swap_differences(surgery.base_config, old, new):
            raise IncompatibleDonorError(
                f"organ {name!r} cannot take these weights: {some(differences)}; choose a donor of the same layers"
            )
        new.rescale(old.config.scale)

        def swap() -> None:
            old.take_over(new, surgery.changes)
            surgery.name_classes(self)

        surgery.changes.make(swap, lambda: surgery.name_classes(self))  # weights and config are undone within

    def add_weighted_donor(
        self,
        donors: Sequence[str],
        weights: Sequence[float] | None,
        donor_name: str,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: str = "total",
        base: BaseLike | None = None,
    ) -> None:
        """Combine loaded organs into a new one, which is frozen and inactive.

        Args:
            donors: Names of two or more loaded organs of one span. The new organ has the place of the first, and
                scale 1.
            weights: As in `average_donors`, like `combination_type`, `density`, `majority_sign_method` and the errors.
            donor_name: Name of the new organ.
            base: What the organs were cut from, for what training changed. `None`: the recipient, if it is their
                base, else the base that they name, of which only these layers are read.

        Raises:
            NotHFError: An organ is not loaded or has modules added to it (LoRA), or the new name is taken.
        """
        combination = Combination(combination_type, density, majority_sign_method)
        surgery, unknown = self._surgery, [name for name in donors if name not in self._surgery.organs]
        self._named(unknown)
        require_free_names([donor_name], list(surgery.organs))
        chosen = [surgery.organs[name] for name in donors]
        for organ in chosen:
            require_own_modules(surgery, organ)
        averaged = average(surgery, chosen, weights, donor_name, combination, base)
        surgery.change(self, lambda: surgery.add(averaged))

    def delete_donor(self, donor_name: str) -> None:
        """Remove an organ; the others stay."""
        (name,) = self._named([donor_name])
        surgery = self._surgery
        surgery.change(self, lambda: surgery.organs.__delitem__(name))

    def unload(self) -> PreTrainedModel:
        """Remove all organs and return the native model with its class, config and `requires_grad` flags restored.

        Raises:
            NotHFError: The model is a scaffold.
        """
        self._surgery.require_layers("unload")
        return self._release([])

    def merge_and_unload(self, dequantize: bool = False) -> PreTrainedModel:
        """Make the active organs part of the native model, which then saves and loads without not_hf.

        Its `name_or_path` is empty until it is saved and loaded: the base's would name a model without them.

        Args:
            dequantize: Dequantize a quantized recipient, which then takes more memory.

        Raises:
            NotHFError: The recipient is quantized and `dequantize` is `False` or not possible; or it is a scaffold, or
                has adapters.
            IncompatibleDonorError: A native model of the spliced config would compute something else. The error lists
                the differences, and the model is unchanged.
        """
        self._surgery.require_layers("merge_and_unload")
        surgery = self._surgery
        chosen = [organ for organ in surgery.organs.values() if organ.active]  # also inside disable_donors()
        if not chosen:
            return self.unload()
        if has_adapters(self):
            raise NotHFError("the model has adapters on top (LoRA); merge or unload them first, then merge the organs")
        packed = is_quantized(self)
        if packed and not dequantize:
            raise NotHFError(
                f"the recipient is quantized ({quantization_name(self)}) and the organs are not; use "
                "merge_and_unload(dequantize=True), or save the organs alone with save_pretrained()"
            )
        with dequantized(self):
            if differences := surgery.differences(surgery.plan(chosen)):
                raise IncompatibleDonorError(
                    f"a native model cannot hold these layers: {some(differences)}; use save_pretrained() instead"
                )
            return self._release(chosen, can_learn=packed)

    def resize_token_embeddings(
        self, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, mean_resizing: bool = True
    ) -> nn.Embedding:
        """As in transformers; also updates `base_config`.

        Raises:
            NotHFError: Embeddings or head may be those of an organ.
        """
        if self._surgery.base_modules:
            raise NotHFError(
                "an organ holds modules of its own beside the layers; resize the recipient before organs are loaded"
            )
        embeddings = super().resize_token_embeddings(new_num_tokens, pad_to_multiple_of, mean_resizing)
        size, base_config = layers_config(self.config).vocab_size, self._surgery.base_config
        if size > base_config.vocab_size:
            warn_once(
                "rows for new tokens are the recipient's, so they are frozen and not saved with organs; to train and "
                "save them, resize the recipient before it gets organs, and name them in trainable_token_indices"
            )
        base_config.vocab_size = size
        return embeddings

    def get_base_model(self) -> PreTrainedModel:
        """Return a model of the native class that shares all modules; as in PEFT, active organs stay in."""
        view = self._surgery.native_class.__new__(self._surgery.native_class)
        view.__dict__ = {key: value for key, value in self.__dict__.items() if key != "_surgery"}
        view.__dict__["active_donors"] = self.active_donors  # so that nothing is cut from it that names the base
        return view

    def _named(self, names: str | Sequence[str]) -> list[str]:
        """Check that organs are loaded, and return their names in load order."""
        organs = self._surgery.organs
        chosen = [names] if isinstance(names, str) else list(names)
        if unknown := [str(name) for name in chosen if name not in organs]:
            raise NotHFError(f"no organ named {', '.join(unknown)}; loaded organs: {', '.join(organs) or 'none'}")
        return [name for name in organs if name in chosen]

    def _release(self, kept: Sequence[Organ], can_learn: bool = False) -> PreTrainedModel:
        """Return the model to its native class, with some organs in its stack.

        Args:
            kept: The organs that stay.
            can_learn: Whether all parameters of the base are trainable, because they were dequantized.
        """
        surgery = self._surgery

        def become_native() -> None:
            surgery.organs, surgery.blocks = {organ.name: organ for organ in kept}, ()
            surgery.release(self, can_learn)
            for organ in kept:
                organ.release_master_weights(surgery.neighbour(self, organ.place.position))
                organ.set_trainable(True)
            if kept:
                forget_conversions(self)
            if not self.model_tags:
                vars(self).pop("model_tags", None)
            self.__class__ = surgery.native_class  # type: ignore[assignment]
            del vars(self)["_surgery"]

        surgery.change(self, become_native, flags=True)
        if kept:  # it is another model than the one of that name
            self.config.name_or_path = self.name_or_path = ""
        return self

    def train(self, mode: bool = True) -> Self:
        """As in torch; warns if there is nothing to train, which gradient checkpointing hides from trainers."""
        if mode and not any(parameter.requires_grad for parameter in self.parameters()):
            warn_once("no parameter of the model can be trained; load organs that are to learn with is_trainable=True")
        return super().train(mode)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Recipient:
        """Apply `to()`, `half()`, … to the layers outside the stack too."""
        surgery, native = self._surgery, super()._apply

        def apply() -> None:
            native(fn, recurse)
            surgery.own_weights.convert(fn)
            if recurse:
                for layer in surgery.parked(self):
                    layer._apply(fn)

        surgery.require_scalable_to(fn)
        surgery.at_scale_one(apply)
        return self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As in torch, but a change that another thread makes to the organs meanwhile is an error."""
        if torch.compiler.is_compiling() or "_surgery" not in vars(self):  # a compiled model may outlive its organs
            return nn.Module.__call__(self, *args, **kwargs)
        with self._surgery.changes.watched():
            filled = FilledCache(self._surgery)
            given = (*args, *kwargs.values())
            filled.check(given)
            if (prefill := take_next(self)) is not None:
                output = prefill.run(functools.partial(nn.Module.__call__, self, *args), kwargs)
            else:
                output = nn.Module.__call__(self, *args, **kwargs)
            found = output.values() if isinstance(output, dict) else output if isinstance(output, tuple) else ()
            filled.note([*given, *found])
            return output

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Rebuild the stack: a copy made inside `disable_donors()` has its organs enabled."""
        super().__setstate__(state)
        self._surgery.apply(self)
