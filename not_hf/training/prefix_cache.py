"""A cache of hidden states at the first trainable layer, which stay the same while the organ is trained."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
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
from not_hf.training.partial_forward import PartialForward
from not_hf.training.row_store import RowStore


class PrefixCache:
    """Runs the frozen layers below the organ once for each row of a batch, and stores the result on disk.

    Args:
        forward: Runs parts of the model.
        entry: Number of the first trainable layer; the number of layers if there is none.
        below: The modules that hidden states at the entry may depend on: those outside the stack and the layers below.
        folder: Each prefix has a subfolder here; `None`: in the assets of the Hub's cache.
        max_bytes: Limit for all subfolders together.
        dtype: To store hidden states in; `None`: as computed, without rounding.
        mixed_precision: The autocast setting of the training; part of the key.

    Raises:
        NotHFError: No layer lies below a trainable one, or something in `below` is trainable.
    """

    def __init__(
        self,
        forward: PartialForward,
        entry: int,
        below: Sequence[nn.Module],
        folder: Path | None,
        max_bytes: int,
        dtype: torch.dtype | None,
        mixed_precision: str,
    ) -> None:
        if entry in (0, len(forward.stack.layers)):
            which = "the first layer" if entry == 0 else "no layer"
            raise NotHFError(
                f"cache_prefix=True stores what is computed below the organ, but {which} is trainable; "
                "use cache_prefix=False, or an organ at a higher position"
            )
        for name, parameter in forward.model.named_parameters():
            if parameter.requires_grad and _is_in(parameter, below):
                raise NotHFError(
                    f"cache_prefix=True needs everything below the organ frozen, but {name} is trainable; "
                    "freeze it, or use cache_prefix=False"
                )
        self.forward, self.entry = forward, entry
        token = torch.zeros(1, 1, dtype=torch.long, device=forward.model.device)
        self._computed = forward.run_to(entry, {"input_ids": token}).dtype
        self.dtype = dtype or self._computed
        self.key = _key(forward.model, below, entry, self.dtype, mixed_precision)
        root = Path(folder or cached_assets_path("not_hf", namespace="prefixes"))
        self.rows = RowStore(root / self.key, max_bytes)

    def hidden(self, inputs: Mapping[str, Any]) -> torch.Tensor:
        """Return the hidden states at the entry, from the cache if it has all rows of the batch.

        If any row is missing, the whole batch is run: so a row's values do not depend on which other rows were cached.

        Args:
            inputs: A batch as the model takes it, without labels.

        Returns:
            Hidden states, `(batch, seq, hidden)`.
        """
        ids = inputs["input_ids"]  # (batch, seq)
        keys, lengths = row_keys(inputs)
        if all(key in self.rows for key in keys):
            width = self.forward.model.config.hidden_size
            rows = [self.rows.read(key, (n, width), self.dtype) for key, n in zip(keys, lengths, strict=True)]
            found = [row for row in rows if row is not None]  # a damaged one is computed again
            if len(found) == len(rows):
                batch = torch.zeros(*ids.shape, width, dtype=self.dtype)
                for into, row in zip(batch, found, strict=True):
                    into[: len(row)] = row
                return batch.to(ids.device, self._computed)
        hidden = self.forward.run_to(self.entry, inputs).to(self.dtype)
        for key, length, row in zip(keys, lengths, hidden, strict=True):
            self.rows.write(key, row[:length])
        return hidden.to(self._computed)


def row_keys(inputs: Mapping[str, Any]) -> tuple[list[bytes], list[int]]:
    """Compute the key of each row of a batch, and its number of tokens without padding on the right.

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
        digest = hashlib.blake2b(digest_size=32)
        for name, value in sorted(values.items()):
            if isinstance(value, torch.Tensor):
                if value.ndim and len(value) == len(ids):
                    value = value[row, :length] if value.shape == ids.shape else value[row]
                value = (tuple(value.shape), str(value.dtype), value.contiguous().numpy().tobytes())
            digest.update(repr((name, value)).encode())
        keys.append(digest.digest())
    return keys, lengths


def _key(model: Any, below: Sequence[nn.Module], entry: int, dtype: torch.dtype, mixed_precision: str) -> str:
    """Digest everything that hidden states at the entry depend on besides the tokens; the name of a folder."""
    config = model.config
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


def _is_in(parameter: nn.Parameter, modules: Sequence[nn.Module]) -> bool:
    return any(parameter is each for module in modules for each in module.parameters())
