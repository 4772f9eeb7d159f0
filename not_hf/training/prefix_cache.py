"""A cache of hidden states at the first trainable layer, which stay the same while the organ is trained."""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import cached_assets_path
from torch import nn

from not_hf.architecture.differences import fingerprint
from not_hf.architecture.partial_forward import PartialForward
from not_hf.architecture.splicing import spliced_config
from not_hf.architecture.stack import layers_config
from not_hf.errors import NotHFError
from not_hf.training.prefix_folder import require_only_stores
from not_hf.training.prefix_key import PrefixKey
from not_hf.training.row_store import RowStore

logger = logging.getLogger(__name__)

Place = tuple[int, slice]  # of tokens in a batch: their row, and from where to where in it
# Inputs that follow from where documents begin and end in their row
_BORDERS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k", "seq_idx")


def prefix_folder(folder: str | os.PathLike[str] | None) -> Path:
    """Return the folder for stores, by default one in the assets of the Hub's cache.

    Raises:
        NotHFError: It holds something else.
    """
    found = Path(folder or cached_assets_path("not_hf", namespace="prefixes"))
    require_only_stores(found)
    return found


@dataclass(frozen=True)
class _Store:
    """Hidden states at the entry, of one state of what lies below.

    Args:
        key: Digest of that state; the name of the store's folder.
        rows: The hidden states by row.
        dtype: dtype that they are stored in.
        computed: dtype that the model computes them in.
    """

    key: str
    rows: RowStore
    dtype: torch.dtype
    computed: torch.dtype


class PrefixCache:
    """Runs the frozen layers below the organ once for each row of a batch, and stores the result on disk.

    Whatever changes below the organ, during a training too, gets a store of its own.

    Args:
        forward: Runs parts of the model.
        entry: Number of the first trainable layer; the number of layers if only what is behind them is trainable.
        below: The modules that hidden states at the entry may depend on: those outside the stack but the head, and the
            layers below.
        around: The modules that contain the stack, outermost first.
        folder: Each prefix has a subfolder here.
        max_bytes: Limit for all subfolders together.
        dtype: To store hidden states in; `None`: as computed, without rounding.
        mixed_precision: The autocast setting of the training; part of the key.
        by_document: Batches are one row of documents that do not attend to each other, each with `position_ids` from 0
            on; store each document by itself, whatever others stand in its row.

    Raises:
        NotHFError: The first layer is trainable, or nothing is. `hidden` raises it when something in `below` is.
    """

    def __init__(
        self,
        forward: PartialForward,
        entry: int,
        below: Sequence[nn.Module],
        around: Sequence[nn.Module],
        folder: Path,
        max_bytes: int,
        dtype: torch.dtype | None,
        mixed_precision: str,
        by_document: bool = False,
    ) -> None:
        if entry == 0 or not any(parameter.requires_grad for parameter in forward.model.parameters()):
            which = "the first layer" if entry == 0 else "nothing"
            raise NotHFError(
                f"cache_prefix=True stores what is computed below the organ, but {which} is trainable; "
                "use cache_prefix=False, or an organ at a higher position"
            )
        self.forward, self.entry, self.folder, self.max_bytes = forward, entry, folder, max_bytes
        self._below, self._given_dtype = below, dtype
        self._keyed = document_keys if by_document else row_keys
        self._fixed_width = _fixed_width(below)
        about = _settings(forward.model, entry, dtype, mixed_precision)
        self._model_key = PrefixKey(forward.model, below, around, about)
        self._said: set[str] = set()
        self.store: _Store | None = None  # opened with the first batch

    def forget(self) -> None:
        """Look at every byte below the organ before the next batch."""
        self._model_key.forget()

    def hidden(self, inputs: Mapping[str, Any], counted: torch.Tensor | None = None) -> torch.Tensor | None:
        """Return the hidden states at the entry, from the cache if it has all rows of the batch.

        If any row is missing, the whole batch is run: so a row's values do not depend on which other rows were cached.

        Args:
            inputs: A batch as the model takes it, without labels.
            counted: Whether there is a loss at each position, `(batch, seq)`; `None`: nowhere in padding.

        Returns:
            Hidden states, `(batch, seq, hidden)`; `None` where they depend on what cannot be followed, and where
            padding, which is not stored, counts.
        """
        store = None if self._has_more_than_tokens(inputs) else self._follow()
        if store is None:
            return None
        ids = inputs["input_ids"]  # (batch, seq)
        keys, places = self._keyed({**inputs, **self._width(inputs)})
        if counted is not None:
            padding = torch.ones(ids.shape, dtype=torch.bool)
            for place in places:
                padding[place] = False
            if (counted.cpu() & padding).any():
                self._warn_once(
                    "cache_prefix does not store padding; batches with labels that are predicted there are run whole"
                )
                return None
        if all(key in store.rows for key in keys):
            width = self.forward.stack.base_model.config.hidden_size
            batch = torch.zeros(*ids.shape, width, dtype=store.dtype)
            rows = [
                store.rows.read(key, batch[place].shape, store.dtype) for key, place in zip(keys, places, strict=True)
            ]
            found = [row for row in rows if row is not None]  # a damaged one is computed again
            if len(found) == len(rows):
                for place, row in zip(places, found, strict=True):
                    batch[place] = row
                return batch.to(ids.device, store.computed)
        hidden = self.forward.run_to(self.entry, inputs).to(store.dtype)
        for key, place in zip(keys, places, strict=True):
            store.rows.write(key, hidden[place])
        return hidden.to(store.computed)

    def _has_more_than_tokens(self, inputs: Mapping[str, Any]) -> bool:
        """Whether a batch has images or sounds, of which nothing says to which row they belong."""
        found = [
            name
            for name, value in inputs.items()
            if isinstance(value, torch.Tensor) and value.is_floating_point() and name != "attention_mask"
        ]
        if found:
            self._warn_once("cache_prefix stores rows of text; batches with %s are run whole", ", ".join(found))
        return bool(found)

    def _width(self, inputs: Mapping[str, Any]) -> dict[str, int]:
        """Return the number of positions of a batch, under a name, where rows depend on that; 0: not at this width."""
        if self._fixed_width is None:
            return {}
        positions = inputs.get("position_ids")
        width = inputs["input_ids"].shape[1] if positions is None else int(positions.max()) + 1
        return {"width": width if width >= self._fixed_width else 0}

    def _warn_once(self, message: str, *values: str) -> None:
        if message not in self._said:
            logger.warning(message, *values)
        self._said.add(message)

    def _follow(self) -> _Store | None:
        """Return the store of the model as it is now, if there can be one."""
        key = self._model_key.current()
        if hook := self._model_key.foreign_hook():
            self._warn_once(
                "cache_prefix is off while there is a hook that may change what the layers below the organ "
                "compute: %s; remove the hook, or use cache_prefix=False",
                hook,
            )
            return None
        if self.store is None or self.store.key != key:
            self._require_frozen()
            token = torch.zeros(1, 1, dtype=torch.long, device=self.forward.model.device)
            computed = self.forward.run_to(self.entry, {"input_ids": token}).dtype
            rows = RowStore(self.folder / key, self.max_bytes)
            self.store = _Store(key, rows, self._given_dtype or computed, computed)
        return self.store

    def _require_frozen(self) -> None:
        below = {id(parameter) for module in self._below for parameter in module.parameters()}
        for name, parameter in self.forward.model.named_parameters():
            if parameter.requires_grad and id(parameter) in below:
                raise NotHFError(
                    f"cache_prefix=True needs everything below the organ frozen, but {name} is trainable; "
                    "freeze it, or use cache_prefix=False"
                )


def row_keys(inputs: Mapping[str, Any]) -> tuple[list[bytes], list[Place]]:
    """Compute the key of each row of a batch, and where its tokens stand, without padding on the right.

    A key is a digest of everything the model is given for the row. An input that has no entry per row counts for all.

    Args:
        inputs: A batch as the model takes it, without labels; `input_ids` is `(batch, seq)`.
    """
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids)
    if mask is not None and mask.shape == ids.shape:
        mask = mask.cpu()
        counts = mask.sum(1)
        if torch.equal(mask.bool(), torch.arange(ids.shape[1]) < counts[:, None]):  # padding on the right only
            mask, lengths = None, counts.tolist()
    values = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    values = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    values |= {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    keys = []
    for row, length in enumerate(lengths):
        own = {}
        for name, value in values.items():
            if isinstance(value, torch.Tensor) and value.ndim and len(value) == len(ids):
                value = value[row, :length] if value.shape == ids.shape else value[row]
            own[name] = value
        keys.append(_digest(own))
    return keys, [(row, slice(0, length)) for row, length in enumerate(lengths)]


def document_keys(inputs: Mapping[str, Any]) -> tuple[list[bytes], list[Place]]:
    """Compute the key of each document of a batch of one row, and where its tokens stand.

    Args:
        inputs: A batch as the model takes it, without labels; `input_ids` and `position_ids` are `(1, seq)`.
    """
    values = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
    shape, positions = values["input_ids"].shape, values["position_ids"]
    starts = (positions[0] == 0).nonzero().flatten().tolist()
    keys, places = [], []
    for start, stop in pairwise([*starts, shape[1]]):
        own = {name: value for name, value in values.items() if name not in _BORDERS}
        of_tokens = {name for name, value in own.items() if isinstance(value, torch.Tensor) and value.shape == shape}
        keys.append(_digest({name: own[name][0, start:stop] if name in of_tokens else own[name] for name in own}))
        places.append((0, slice(start, stop)))
    return keys, places


def _digest(values: Mapping[str, Any]) -> bytes:
    """Digest what the model is given for one row or document."""
    digest = hashlib.blake2b(digest_size=32)
    for name, value in sorted(values.items()):
        if isinstance(value, torch.Tensor):
            value = (tuple(value.shape), str(value.dtype), value.contiguous().numpy().tobytes())
        digest.update(repr((name, value)).encode())
    return digest.digest()


def _fixed_width(below: Sequence[nn.Module]) -> int | None:
    """Return from how many positions on rotary frequencies follow the width of a batch; `None`: they never do."""
    found: list[int] = []
    for module in (each for part in below for each in part.modules()):
        kinds = str(getattr(module, "rope_type", ""))  # a dict where layers of each type have one
        if "dynamic" in kinds or "longrope" in kinds:
            rotary: Any = module
            rope = rotary.config.rope_parameters
            given = [each for each in (rope, *rope.values()) if isinstance(each, dict)]
            trained = [each.get("original_max_position_embeddings") for each in given]
            found += [rotary.original_max_seq_len, *filter(None, trained)]
    return min(found, default=None)


def _settings(model: Any, entry: int, dtype: torch.dtype | None, mixed_precision: str) -> dict[str, Any]:
    """Return what hidden states at the entry depend on besides the tokens and the modules below it."""
    config = layers_config(model.config)
    return {
        "version": 3,  # 2: no dropout of modules around the layers; 3: mixed precision in models of PEFT too
        "layers": fingerprint(spliced_config(config, [(config, n) for n in range(entry)])),
        "dtype": str(dtype),
        "mixed_precision": mixed_precision,
        "device": model.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "float32": _float32_precision(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }


def _float32_precision() -> list[str]:
    """Return how exactly float32 matrices are multiplied: TF32 and the like round."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):
        return [torch.get_float32_matmul_precision()]
    return [backend.matmul.fp32_precision for backend in (torch.backends.cuda, torch.backends.mkldnn)]
