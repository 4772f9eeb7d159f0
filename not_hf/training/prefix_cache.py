"""The frozen prefix: hidden states at the first layer that learns, which never change while it is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from huggingface_hub import cached_assets_path
from torch import nn

from not_hf.architecture.differences import fingerprint
from not_hf.architecture.splicing import spliced_config
from not_hf.architecture.upstream import attention_of
from not_hf.errors import NotHFError
from not_hf.training.partial_forward import Partway
from not_hf.training.row_store import RowStore


def first_trainable(partway: Partway) -> int:
    """Number of the first layer with a parameter that learns; the number of layers when none does."""
    layers = partway.stack.layers
    return next((n for n, layer in enumerate(layers) if any(p.requires_grad for p in layer.parameters())), len(layers))


def outside(partway: Partway) -> list[nn.Module]:
    """The modules beside the stack: embeddings, rotary, final norm, head."""
    found: list[nn.Module] = []
    parent: nn.Module = partway.model
    for step in partway.stack.full_path.split("."):
        found += [module for name, module in parent.named_children() if name != step]
        parent = getattr(parent, step)
    return found


class FrozenPrefix:
    """What is below the first layer that learns, run once per row of a batch and kept on disk.

    Args:
        partway: The model, its trainable layers standing in the stack.
        folder: Where hidden states are kept, in a folder of their own for each prefix; `None`: among the assets in the
            Hub's cache.
        max_bytes: All of them together.
        dtype: That hidden states are kept in; `None`: the one they have, so that nothing is rounded.
        mixed_precision: What autocast is on while the model runs, for the key.

    Raises:
        NotHFError: There is nothing below the organ, or something below it learns.
    """

    def __init__(
        self, partway: Partway, folder: Path | None, max_bytes: int, dtype: torch.dtype | None, mixed_precision: str
    ) -> None:
        self.partway = partway
        self.entry = first_trainable(partway)
        layers = partway.stack.layers
        if self.entry in (0, len(layers)):
            what = "the first layer" if self.entry == 0 else "no layer"
            raise NotHFError(
                f"cache_prefix=True keeps what is computed below the organ, but {what} learns; "
                "use cache_prefix=False, or an organ at a higher position"
            )
        below = [*outside(partway), *list(layers)[: self.entry]]
        if learning := [name for name, p in partway.model.named_parameters() if p.requires_grad and _in(p, below)]:
            raise NotHFError(f"cache_prefix=True wants everything below the organ frozen, but {learning[0]} learns")
        token = torch.zeros(1, 1, dtype=torch.long, device=partway.model.device)
        self._computed = partway.run_to(self.entry, {"input_ids": token}).dtype
        self.dtype = dtype or self._computed
        self.key = _key(partway, below, self.entry, self.dtype, mixed_precision)
        root = Path(folder or cached_assets_path("not_hf", namespace="prefixes"))
        self.rows = RowStore(root / self.key, max_bytes)

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Hidden states at the entry, `(batch, seq, hidden)`: from the cache if it has all rows.

        A batch of which some are missing is run whole, so that a row is the same numbers whatever it came with.

        Args:
            inputs: A batch as the model takes it, without labels.
        """
        ids = inputs["input_ids"]  # (batch, seq)
        keys, lengths = row_keys(inputs)
        if all(key in self.rows for key in keys):
            width = self.partway.model.config.hidden_size
            rows = [self.rows.read(key, (n, width), self.dtype) for key, n in zip(keys, lengths, strict=True)]
            found = [row for row in rows if row is not None]  # a damaged one is computed again
            if len(found) == len(rows):
                batch = torch.zeros(*ids.shape, width, dtype=self.dtype)
                for into, row in zip(batch, found, strict=True):
                    into[: len(row)] = row
                return batch.to(ids.device, self._computed)
        hidden = self.partway.run_to(self.entry, inputs).to(self.dtype)
        for key, length, row in zip(keys, lengths, hidden, strict=True):
            self.rows.write(key, row[:length])
        return hidden.to(self._computed)


def row_keys(inputs: Mapping[str, Any]) -> tuple[list[bytes], list[int]]:
    """What each row of a batch is kept under, and its tokens, padding on the right left out.

    Rows are told apart by everything the model is given for them; anything that is not one row each counts for all.

    Args:
        inputs: A batch as the model takes it, without labels; `input_ids` is `(batch, seq)`.
    """
    ids = inputs["input_ids"].cpu()
    mask = inputs.get("attention_mask")
    lengths = [ids.shape[1]] * len(ids)
    if mask is not None and mask.shape == ids.shape:
        mask = mask.cpu()
        counts = mask.sum(1)
        if torch.equal(mask.bool(), torch.arange(ids.shape[1]) < counts[:, None]):  # padding on the right alone
            mask, lengths = None, counts.tolist()
    values = {name: value for name, value in inputs.items() if name not in ("input_ids", "attention_mask")}
    values = {name: value.cpu() if isinstance(value, torch.Tensor) else value for name, value in values.items()}
    values |= {"input_ids": ids} if mask is None else {"input_ids": ids, "attention_mask": mask}
    keys = []
    for row, length in enumerate(lengths):
        digest = hashlib.blake2b(digest_size=32)
        for name, value in sorted(values.items()):
            if isinstance(value, torch.Tensor):
                if value.ndim and len(value) == len(ids):
                    value = value[row, :length] if value.shape == ids.shape else value[row]
                value = (tuple(value.shape), str(value.dtype), value.contiguous().numpy().tobytes())
            digest.update(repr((name, value)).encode())
        keys.append(digest.digest())
    return keys, lengths


def _key(partway: Partway, below: Iterable[nn.Module], entry: int, dtype: torch.dtype, mixed_precision: str) -> str:
    """Everything that hidden states at the entry depend on beside the tokens, as a name for a folder."""
    model = partway.model
    config: Any = model.config
    about = {
        "layers": fingerprint(spliced_config(config, [(config, n) for n in range(entry)])),
        "attention": attention_of(config),
        "dtype": str(dtype),
        "mixed_precision": mixed_precision,
        "device": model.device.type,
        "cpu": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for n, module in enumerate(below):
        for name, tensor in sorted({**dict(module.named_parameters()), **dict(module.named_buffers())}.items()):
            digest.update(f"{n} {name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()[:32]


def _in(parameter: nn.Parameter, modules: Iterable[nn.Module]) -> bool:
    return any(parameter is each for module in modules for each in module.parameters())
