"""`StrippedModel`: a native base model of which only the layers are left."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast

from not_hf.architecture.differences import config_differences, describe, inherit_attributes, same_modules
from not_hf.architecture.layers import adopt
from not_hf.architecture.splicing import set_layer_index, spliced_config
from not_hf.architecture.stack import Stack, find_stack, head_class
from not_hf.architecture.tables import NEUTRAL_EMBEDDING
from not_hf.architecture.twin import build, meta_twin
from not_hf.architecture.upstream import (
    DelegatesAttention,
    attention_of,
    built_whole,
    set_attention,
    set_layers,
    swapped_layers,
)
from not_hf.config import DonorConfig, OrganSpec
from not_hf.errors import CorruptDonorError, UnsupportedArchitectureError, one_line, some

# modules beside the layers that do not touch hidden states: they say where tokens stand
POSITIONAL = ("rotary", "rope")


class StrippedModel(DelegatesAttention, PreTrainedModel):
    """The layers of a span in the native base model they were cut from, everything else taken out.

    Args:
        config: What the organ is and where it was cut.
        spec: What `config.check()` returned, where it was called before.

    Raises:
        CorruptDonorError: The config contradicts itself.
        UnsupportedArchitectureError: The architecture has no stack that can be cut.
    """

    config: DonorConfig
    config_class = DonorConfig
    base_model_prefix = "organ"
    main_input_name = "inputs_embeds"
    supports_gradient_checkpointing = True

    def __init__(self, config: DonorConfig, *args: Any, spec: OrganSpec | None = None, **kwargs: Any) -> None:
        spec = spec or config.check()
        expected = spliced_config(spec.base, [(spec.base, n) for n in range(*config.span)])
        if contradictions := config_differences(spec.organ, expected):
            raise CorruptDonorError(
                f"donor config: organ_config contradicts layers {config.layers} of base_config: {some(contradictions)}"
            )
        attention = attention_of(config)  # as asked for; the next line chooses one where nothing was
        super().__init__(config, *args, **kwargs)
        stack = _build_layers(spec, attention)
        _strip(stack)
        self.organ: PreTrainedModel = stack.base_model
        set_attention(config, attention_of(self.organ.config))
        self._stack_path = stack.path
        self.post_init()

    @property
    def stack(self) -> Stack:
        """Where the organ's layers are."""
        return Stack(self, self.base_model_prefix, self._stack_path)

    def get_input_embeddings(self) -> None:  # type: ignore[override]
        """An organ has no embeddings."""

    def get_output_embeddings(self) -> None:
        """An organ has no head."""

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        use_cache: bool | None = False,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Run the organ alone on hidden states.

        Given the base's `hidden_states[i]`, the result is its `hidden_states[j]` (before the final norm if `j` is the
        last).

        Args:
            inputs_embeds: Hidden states at the organ's entry, `(batch, seq, hidden)`.
            attention_mask: 1 for tokens, 0 for padding, `(batch, seq)`.
            position_ids: Positions of the tokens, `(batch, seq)`.
            use_cache: Return `past_key_values`.
            **kwargs: As in the native base model (`past_key_values`, `output_hidden_states`, …).

        Returns:
            The native output; `last_hidden_state` is `(batch, seq, hidden)`.
        """
        return self.organ(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            use_cache=use_cache,
            **kwargs,
        )

    @torch.no_grad()
    def require_bare(self, hidden: torch.Tensor) -> None:
        """Check that nothing but the layers is left: without them hidden states go through unchanged.

        Args:
            hidden: Any hidden states, `(batch, seq, hidden)`.

        Raises:
            UnsupportedArchitectureError: Something beside the layers changes hidden states, or needs the rest.
        """
        kind = f"model_type {self.organ.config.model_type!r}"
        try:
            with swapped_layers(self.stack.layers, []):
                found = self(inputs_embeds=hidden).last_hidden_state
        except Exception as error:  # native forwards raise anything on what they do not expect
            raise UnsupportedArchitectureError(
                f"layers of {kind} cannot be run without the rest: {one_line(error, 200)}"
            ) from error
        if not torch.equal(found, hidden):
            raise UnsupportedArchitectureError(f"{kind} changes hidden states outside of its layers")


def _build_layers(spec: OrganSpec, attn_implementation: str | None) -> Stack:
    """The organ's layers in a native model, as they are at their place in the base."""
    native = copy.deepcopy(spec.organ)
    set_attention(native, attn_implementation)
    for key, neutral in NEUTRAL_EMBEDDING.items():
        if hasattr(native, key):
            setattr(native, key, neutral)
    # in the dtype that is being loaded, not in the one the base's config names
    dtype, span = torch.get_default_dtype(), slice(*spec.config.span)
    hollow = torch.get_default_device().type == "meta"  # to be filled: there is nothing to initialize
    with built_whole(hollow):
        stack = find_stack(build(head_class(native).from_config, native, dtype=dtype))
    originals = meta_twin(spec.base).descriptions[span]
    if not same_modules(map(describe, stack.layers), originals):  # what a layer is made of depends on where it stands
        base = copy.deepcopy(spec.base)
        set_attention(base, attn_implementation)
        with built_whole():
            whole = find_stack(build(head_class(base).from_config, base, dtype=dtype))
        set_layers(stack.layers, list(whole.layers)[span])
        for n, layer in enumerate(stack.layers):
            set_layer_index(layer, n)
            adopt(layer, native, {}, layer.training)
    inherit_attributes(list(stack.layers), originals)
    return stack


def _strip(stack: Stack) -> None:
    """Put a `Passthrough` in the place of everything in the base model but its layers and its rotary embeddings."""
    parent: nn.Module = stack.base_model
    for step in stack.path.split("."):
        for name, _ in list(parent.named_children()):
            if name != step and not any(word in name for word in POSITIONAL):
                setattr(parent, name, Passthrough())
        parent = getattr(parent, step)


class Passthrough(nn.Module):
    """Stands where a stripped module was: hands hidden states on, answers anything else with a zero."""

    def forward(self, x: Any = None, *args: Any, inputs_embeds: Any = None, **kwargs: Any) -> torch.Tensor:
        """`x` itself when it is `(batch, seq, hidden)`, else a zero without dimensions.

        Embeddings of encoders are called with no ids, and with the hidden states second or by name.
        """
        if x is None:
            x = next((arg for arg in (inputs_embeds, *args) if isinstance(arg, torch.Tensor)), None)
        if isinstance(x, torch.Tensor) and x.is_floating_point() and x.ndim > 2:
            return x
        return torch.zeros((), device=x.device if isinstance(x, torch.Tensor) else None)
