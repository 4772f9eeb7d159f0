"""`StrippedModel`: a native base model stripped of everything but its layers."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from not_hf.architecture import releases, upstream
from not_hf.architecture.differences import config_differences, describe, inherit_attributes, same_modules
from not_hf.architecture.layers import adopt
from not_hf.architecture.part_names import ALL
from not_hf.architecture.parts import keep_parameters
from not_hf.architecture.splicing import set_layer_index, spliced_config
from not_hf.architecture.stack import Stack, find_stack, head_class
from not_hf.architecture.tables import NEUTRAL_EMBEDDING
from not_hf.architecture.twin import build, meta_twin
from not_hf.cards.description import as_html, describe_organ
from not_hf.config import DonorConfig, OrganSpec
from not_hf.errors import CorruptDonorError, NotHFError, UnsupportedArchitectureError, interval, one_line, some

# Names of modules that stay beside the layers: they compute positions, not hidden states.
POSITIONAL = ("rotary", "rope", "pos_emb")


class StrippedModel(PreTrainedModel):
    """The base class of `DonorModel`.

    Args:
        config: Describes the organ and its base.
        spec: The result of `config.check()`, if already called.
        max_values: How many values its parameters and buffers may have; `None`: any number.
    """

    config: DonorConfig
    config_class = DonorConfig
    base_model_prefix = "organ"
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True
    # which attention implementations there are is for the native model to say
    _supports_sdpa = _supports_flash_attn = _supports_flex_attn = _supports_attention_backend = True

    def __init__(
        self,
        config: DonorConfig,
        *args: Any,
        spec: OrganSpec | None = None,
        max_values: int | None = None,
        **kwargs: Any,
    ) -> None:
        spec = spec or config.check()
        expected = spliced_config(spec.base, [(spec.base, n) for n in range(*config.span)])
        if contradictions := config_differences(spec.organ, expected):
            raise CorruptDonorError(
                f"donor config: organ_config contradicts layers {interval(config.span)} of base_config: "
                f"{some(contradictions)}"
            )
        attention = upstream.attention_of(config)  # `None` lets the next line choose one
        super().__init__(config, *args, **kwargs)
        stack = _build_layers(spec, attention)
        _strip(stack)
        keep_parameters(stack.layers, config.modules)
        self.organ: PreTrainedModel = stack.base_model
        upstream.set_attention(config, upstream.attention_of(self.organ.config))
        self._stack_path = stack.path
        # transformers builds a model on the meta device, and allocates what the files do not fill only afterwards
        num_values = sum(tensor.numel() for tensor in (*self.parameters(), *self.buffers()))
        if max_values is not None and num_values > max_values:
            raise CorruptDonorError(
                f"the config describes layers of {num_values:,} values, far more than the files hold; "
                "cut the organ again"
            )
        self.post_init()

    @property
    def stack(self) -> Stack:
        """The donor's layers."""
        return Stack(self, self.base_model_prefix, self._stack_path)

    def extra_repr(self) -> str:
        """Describe the donor, for `print(donor)`."""
        return describe_organ(self.config)

    def _repr_html_(self) -> str:
        return as_html({"donor": self.config})

    @classmethod
    def is_custom_code(cls) -> bool:
        """Return `False`: the layers are native, and so is how transformers fills the buffers that no file holds."""
        return False

    def initialize_weights(self) -> None:
        """As in transformers, but not parts of layers, of which files hold all values, and which do not run."""
        if self.config.modules == ALL:
            super().initialize_weights()

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """Return `None`: a donor has no embeddings."""

    def get_output_embeddings(self) -> None:
        """Return `None`: a donor has no head."""

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the layers on hidden states: on the base's `hidden_states[i]`, they return its `hidden_states[j]`.

        If `j` is the base's last layer, these are the hidden states before the final norm.

        Args:
            inputs_embeds: Input hidden states, `(batch, seq, hidden)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, seq)`.
            position_ids: Positions of the tokens, `(batch, seq)`.
            use_cache: Return `past_key_values`.
            **kwargs: As in the native base model (`past_key_values`, `output_hidden_states`, …).

        Returns:
            The native output; `last_hidden_state` is `(batch, seq, hidden)`.

        Raises:
            NotHFError: The donor holds parts of layers.
        """
        if self.config.modules != ALL:
            raise NotHFError("a donor of parts of layers cannot run alone; transplant it into a recipient")
        return self.organ(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    def written_by(self, layer: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        """Run one layer on hidden states, and return what it adds to them, both `(batch, seq, hidden)`."""
        with upstream.swapped_layers(self.stack.layers, [layer]):
            return self(inputs_embeds=hidden).last_hidden_state - hidden

    @torch.no_grad()
    def require_bare(self, hidden: torch.Tensor) -> None:
        """Check that without layers hidden states, `(batch, seq, hidden)`, pass unchanged, and layers take no others.

        Raises:
            UnsupportedArchitectureError: Another module changes them, or a module needs the rest of the base.
        """
        kind = f"model_type {self.organ.config.model_type!r}"
        try:
            with upstream.swapped_layers(self.stack.layers, []), releases.of_dtype(self.organ, hidden.dtype):
                found = self(inputs_embeds=hidden).last_hidden_state
        except Exception as error:  # a native forward may raise anything
            raise _cannot_run(kind, error) from error
        if not torch.equal(found, hidden):
            raise UnsupportedArchitectureError(f"{kind} changes hidden states outside of its layers")

        def require_one(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            given = [each for each in (*args, *kwargs.values()) if isinstance(each, torch.Tensor)]
            if sum(each.shape == hidden.shape for each in given) > 1:
                raise UnsupportedArchitectureError(
                    f"layers of {kind} take the embeddings, too; they cannot be run without their base"
                )

        hook = self.stack.layers[0].register_forward_pre_hook(require_one, with_kwargs=True)
        try:
            self(inputs_embeds=hidden)
        except UnsupportedArchitectureError:
            raise
        except Exception as error:
            raise _cannot_run(kind, error) from error
        finally:
            hook.remove()


def _cannot_run(kind: str, error: Exception) -> UnsupportedArchitectureError:
    return UnsupportedArchitectureError(f"layers of {kind} cannot be run without their base: {one_line(error, 200)}")


def _build_layers(spec: OrganSpec, attn_implementation: str | None) -> Stack:
    """Build a native model of the span, with layers as at their place in the base."""
    native = copy.deepcopy(spec.organ)
    upstream.set_attention(native, attn_implementation)
    for key, neutral in NEUTRAL_EMBEDDING.items():
        if hasattr(native, key):
            setattr(native, key, neutral)
    # the dtype that is being loaded, not that of the base's config
    dtype, span = torch.get_default_dtype(), slice(*spec.config.span)
    hollow = torch.get_default_device().type == "meta"  # filled later
    with upstream.built_whole(hollow):
        stack = find_stack(build(head_class(native).from_config, native, dtype=dtype))
    originals = meta_twin(spec.base).descriptions[span]
    if not same_modules(map(describe, stack.layers), originals):  # modules depend on the place in the stack
        base = copy.deepcopy(spec.base)
        upstream.set_attention(base, attn_implementation)
        with upstream.built_whole():
            whole = find_stack(build(head_class(base).from_config, base, dtype=dtype))
        upstream.set_layers(stack.layers, list(whole.layers)[span])
        for n, layer in enumerate(stack.layers):
            set_layer_index(layer, n, len(stack.layers))
            adopt(layer, native, {}, layer.training)
    inherit_attributes(list(stack.layers), originals)
    return stack


def _strip(stack: Stack) -> None:
    """Replace all modules of the base model but its layers and rotary embeddings by a `Passthrough`."""
    parent: nn.Module = stack.base_model
    kind = f"model_type {stack.base_model.config.model_type!r}"
    for step in stack.path.split("."):
        for name, _ in parent.named_parameters(recurse=False):
            raise UnsupportedArchitectureError(f"{kind} changes hidden states outside of its layers ({name})")
        for name, _ in list(parent.named_children()):
            if name != step and not any(word in name for word in POSITIONAL):
                setattr(parent, name, Passthrough())
        parent = getattr(parent, step)


class Passthrough(nn.Module):
    """Replaces a stripped module: returns hidden states unchanged, and zero for other inputs."""

    def forward(self, x: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> torch.Tensor:
        """Return `x` if it is `(batch, seq, hidden)`, else a zero without dimensions.

        Encoders call their embeddings without `x`, and pass the hidden states second or by name.
        """
        if x is None:
            x = next((arg for arg in (inputs_embeds, *args) if isinstance(arg, torch.Tensor)), None)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 2:
            return x
        return torch.zeros((), device=x.device if isinstance(x, torch.Tensor) else None)
