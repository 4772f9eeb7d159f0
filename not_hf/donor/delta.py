"""Delta files: an organ stored as the change of the base's layers, and read together with them.

A checkpoint of the variant `delta` (`model.delta.safetensors`) holds a matrix of the organ either as two factors whose
product is the change, `<name>.delta_up` (…, out, rank) and `<name>.delta_down` (…, rank, in), or as the change itself
in bfloat16, `<name>.delta`. Dimensions before the last two count matrices (experts in one tensor). A tensor for which
that would not be smaller, such as a vector, is there whole, by its own name.
"""

from __future__ import annotations

import math
import os
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from huggingface_hub.utils import tqdm
from torch import nn

from not_hf.architecture.parts import ALL
from not_hf.architecture.upstream import SHARED_KWARGS
from not_hf.config import DELTA, DonorConfig
from not_hf.donor.cutting import StoredBase, open_base
from not_hf.donor.loading import common_dtype, refuse
from not_hf.donor.saved_modules import is_saved
from not_hf.donor.stripped import StrippedModel
from not_hf.errors import CorruptDonorError, IncompatibleDonorError, NotHFError, interval, one_line, some
from not_hf.hub.checkpoint import FLOAT_DTYPES, View, checkpoint_files, file_names, open_checkpoint, torch_dtype
from not_hf.hub.digest import digest

_PARTS = {"low_rank": (".delta_up", ".delta_down"), "bfloat16": (".delta",)}  # endings of names, by kind
_DTYPES = {name: stored for stored, name in FLOAT_DTYPES.items()}


@dataclass(frozen=True)
class Delta:
    """How an organ is stored as a change, and of which layers: `delta` in a donor's `config.json`.

    Args:
        kind: `"low_rank"` or `"bfloat16"`.
        rank: Of the products, for `"low_rank"`.
        base_model_name_or_path: Hub ID or folder of the layers that are changed.
        base_revision: Commit of that repo, `None` for a folder.
        base_subfolder: Folder in it.
        base_digest: `digest` of these layers in its files, by their names in an organ; of parts, if it holds such.
        dtype: dtype of the organ's tensors that are stored as a change.
        lost: Norm of what the file does not hold of the change, as a share of the change's norm.
    """

    kind: str
    rank: int | None
    base_model_name_or_path: str
    base_revision: str | None = None
    base_subfolder: str | None = None
    base_digest: str = ""
    dtype: str = "float32"
    lost: float = 0.0

    @classmethod
    def of(cls, config: DonorConfig) -> Delta:
        """Read it from a donor's config.

        Raises:
            CorruptDonorError: It is incomplete, or a value is invalid.
        """
        try:
            delta = cls(**config.delta or {})
        except TypeError as error:
            raise CorruptDonorError(f"donor config delta: {one_line(error, 200)}") from error
        texts = (delta.base_model_name_or_path, delta.base_digest, delta.kind, delta.dtype)
        maybe = (delta.base_revision, delta.base_subfolder)
        is_plain = all(isinstance(text, str) and text for text in texts)
        is_plain &= all(text is None or isinstance(text, str) for text in maybe)
        if not is_plain or delta.kind not in _PARTS or delta.dtype not in _DTYPES:
            raise CorruptDonorError(
                f"donor config delta needs a kind of {(*_PARTS,)}, a dtype of {(*_DTYPES,)}, and the name, revision "
                f"and digest of its base, got {config.delta!r:.200}"
            )
        return delta

    def is_smaller(self, shape: Sequence[int], dtype: torch.dtype) -> bool:
        """Whether the change of a tensor takes fewer bytes than the tensor."""
        if len(shape) < 2:
            return False
        rows, columns = shape[-2:]
        if self.kind == "bfloat16":
            return dtype.itemsize > torch.bfloat16.itemsize
        return (self.rank or 0) * (rows + columns) < rows * columns

    def split(self, change: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
        """The parts that are stored of a change."""
        if self.kind == "bfloat16":
            return (change.bfloat16(),)
        down, up, _ = low_rank(change, self.rank or 1)
        return up.to(dtype), down.to(dtype)

    def open_base(
        self, config: DonorConfig, names: Collection[str], hub_kwargs: Mapping[str, Any]
    ) -> tuple[StoredBase, dict[str, View]]:
        """Open the layers of the base: by their names in an organ, as lazy views.

        Args:
            config: The donor's.
            names: Tensors of the organ that are stored as changes. If it holds parts of layers, only these are opened.
            hub_kwargs: `token`, `cache_dir`, …

        Raises:
            NotHFError: The base has no such layers, or none that can be cut.
            OSError: It cannot be read.
        """
        shared = {key: value for key, value in hub_kwargs.items() if key in SHARED_KWARGS}
        where = {**shared, "revision": self.base_revision, "subfolder": self.base_subfolder or ""}
        prefix = f"{StrippedModel.base_model_prefix}."
        needed = None if config.modules == ALL else {name.removeprefix(prefix) for name in names}
        try:
            base: Any = open_base(self.base_model_name_or_path, **where)  # not live, as it has a name
            tensors = base.tensors(config.span, needed)
        except OSError as error:
            raise OSError(
                f"a delta needs layers {interval(config.span)} of {self.base_model_name_or_path}, which cannot be "
                f"read: {one_line(error)}; to use another copy, name it in config.json under delta"
            ) from error
        return base, {f"{prefix}{name}": view for name, view in tensors.items()}


@dataclass(frozen=True)
class Restored:
    """A tensor of an organ that is stored as a change. It is computed when it is indexed; else it is like a `View`."""

    shape: list[int]
    dtype: str  # as safetensors calls it
    parts: tuple[Any, ...]  # views, or headers
    base: View | None = None  # not needed for shape and dtype

    def get_dtype(self) -> str:
        """As in `View`."""
        return self.dtype

    def get_shape(self) -> list[int]:
        """As in `View`."""
        return self.shape

    def __getitem__(self, index: Any) -> torch.Tensor:
        assert self.base is not None
        return changed(self.base[...], [part[...] for part in self.parts], torch_dtype(self.dtype))[index]

    def chunks(self) -> Iterator[torch.Tensor]:
        """As in `View`, but all values at once."""
        yield self[...].flatten()


FileTensor = View | Restored


@torch.no_grad()
def changed(base: torch.Tensor, parts: Sequence[torch.Tensor], dtype: torch.dtype) -> torch.Tensor:
    """Add a change to a tensor: `base + up @ down`, or `base + change`, computed in float32 or wider."""
    precise = torch.promote_types(dtype, torch.float32)
    first, *second = (part.to(precise) for part in parts)
    return (base.to(precise) + (first @ second[0] if second else first)).to(dtype)


def low_rank(change: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Split matrices `(…, out, in)` into `(…, rank, in)` and `(…, out, rank)`, and measure what the product loses.

    It is their best approximation of that rank (Eckart and Young, 1936), by singular value decomposition.
    """
    left, values, right = torch.linalg.svd(change, full_matrices=False)
    kept, padding = values[..., :rank].sqrt(), max(0, rank - values.shape[-1])
    down = nn.functional.pad(kept[..., :, None] * right[..., :rank, :], (0, 0, 0, padding))
    up = nn.functional.pad(left[..., :, :rank] * kept[..., None, :], (0, padding))
    total = values.norm()
    return down, up, float(values[..., rank:].norm() / total) if total else 0.0


def plan_delta(kind: str | None, rank: int | None, config: DonorConfig, is_pushed: bool = False) -> Delta | None:
    """Check the arguments `delta` and `rank` of a save, and that the base of a donor can be read again.

    Args:
        kind: `None`: save whole tensors.
        rank: `None`: 64, for `"low_rank"`.
        config: Names what the organ was cut from.
        is_pushed: Whether others are to read it.

    Raises:
        NotHFError: An argument is out of range, or the base has no name, or one that means nothing elsewhere.
    """
    if kind is None and rank is None:
        return None
    if kind not in _PARTS or (rank is not None and kind != "low_rank"):
        raise NotHFError(f"delta must be one of {(*_PARTS,)}, and rank is for 'low_rank', got {kind!r} and {rank!r}")
    if kind == "low_rank" and not (type(rank := 64 if rank is None else rank) is int and rank > 0):
        raise NotHFError(f"rank must be a positive integer, got {rank!r}")
    if (base := config.base_model_name_or_path) is None:
        raise NotHFError(
            "a delta is read together with its base, and this donor names none; leave out delta, or cut the organ "
            "from a folder or Hub ID"
        )
    if is_pushed:
        require_on_hub(base, "leave out delta, or name the base's Hub ID when cutting (not-hf extract --base-name)")
    return Delta(kind, rank, base, config.base_revision, config.base_subfolder)


def require_on_hub(base: str, instead: str) -> None:
    """Check that the base of a delta that is pushed means something elsewhere; `instead` says what to do if not."""
    if os.path.isdir(base):
        raise NotHFError(f"a delta is read together with its base, and {base} is a folder on this machine; {instead}")


@torch.no_grad()
def write_delta(
    folder: str | os.PathLike[str], delta: Delta, config: DonorConfig, **hub_kwargs: Any
) -> tuple[dict[str, Any], int]:
    """Replace the checkpoint in a folder, which is a draft, by a delta file.

    Args:
        folder: It holds the whole tensors.
        delta: From `plan_delta`.
        config: The donor's.
        **hub_kwargs: For the base.

    Returns:
        What the config says of it, and the size of its tensors in bytes.

    Raises:
        NotHFError: It would not be smaller.
        IncompatibleDonorError: The base's files hold these layers in another layout.
        OSError: The base cannot be read.
    """
    whole = open_checkpoint(folder)
    organ = {name: view for name, view in whole.items() if not is_saved(name)}
    dtype = common_dtype(organ)
    usual = [name for name, view in organ.items() if torch_dtype(view.dtype) is dtype]
    names = [name for name in usual if delta.is_smaller(whole[name].shape, dtype)]
    if not names:
        wish = "in bfloat16" if delta.kind == "bfloat16" else f"of rank {delta.rank}"
        raise NotHFError(f"a delta {wish} is no smaller than these layers in {dtype}; leave out delta, or lower rank")
    base, layers = delta.open_base(config, names, hub_kwargs)
    unlike = [name for name in names if name not in layers or list(layers[name].shape) != list(whole[name].shape)]
    if unlike or base.quantization is not None:
        kind = "other" if base.quantization is None else "quantized"
        raise IncompatibleDonorError(
            f"the files of {base.name} hold {kind} tensors in the place of the organ's {some(unlike or names)}; "
            "leave out delta"
        )
    stored, lost = _stored(whole, {name: layers[name] for name in names}, delta, dtype)
    content = safetensors.torch.save(stored, {"format": "pt"})
    for path in checkpoint_files(folder).values():
        os.remove(path)
    Path(folder, file_names(DELTA)[0]).write_bytes(content)
    name_of_dtype = str(dtype).removeprefix("torch.")
    written = replace(delta, base_revision=base.revision, base_digest=digest(layers), dtype=name_of_dtype, lost=lost)
    return asdict(written), sum(tensor.nbytes for tensor in stored.values())


def _stored(
    whole: Mapping[str, View], base: Mapping[str, View], delta: Delta, dtype: torch.dtype
) -> tuple[dict[str, torch.Tensor], float]:
    """Compute what is stored of an organ, with changes of the tensors in `base`, and which share of these is lost."""
    precise = torch.promote_types(dtype, torch.float32)
    stored: dict[str, torch.Tensor] = {}
    lost = total = 0.0
    for name in tqdm(list(whole), desc="Computing delta", unit="tensor", delay=2, leave=False):
        tensor = whole[name][...]
        if name not in base:
            stored[name] = tensor
            continue
        before = base[name][...]
        change = tensor.to(precise) - before.to(precise)
        parts = delta.split(change, dtype)
        stored |= {f"{name}{end}": part.contiguous() for end, part in zip(_PARTS[delta.kind], parts, strict=True)}
        lost += float((changed(before, parts, dtype).to(precise) - tensor.to(precise)).norm() ** 2)
        total += float(change.norm() ** 2)
    return stored, math.sqrt(lost / total) if total else 0.0


def assembled(stored: Mapping[str, Any], config: DonorConfig) -> dict[str, Any]:
    """Return the tensors of an organ by name, from the views or headers of its files; values of changes need a base.

    What is no part of a change is left as it is.

    Raises:
        CorruptDonorError: Parts do not fit each other, or the config says nothing valid of them.
    """
    if config.delta is None:
        return dict(stored)
    delta, tensors = Delta.of(config), dict(stored)
    first, *others = _PARTS[delta.kind]
    for name in [key.removesuffix(first) for key in stored if key.endswith(first)]:
        keys = [f"{name}{end}" for end in (first, *others)]
        if name in stored or not stored.keys() >= set(keys):
            continue  # unexpected, for whoever compares them with the layers
        parts = tuple(tensors.pop(key) for key in keys)
        shape, *factors = (list(part.shape) for part in parts)
        for down in factors:
            if min(len(shape), len(down)) < 2 or [*shape[:-2], shape[-1]] != down[:-1]:
                raise CorruptDonorError(f"the parts of {name} have shapes {shape} and {down}, which have no product")
            shape = [*shape[:-1], down[-1]]
        tensors[name] = Restored(shape, _DTYPES[delta.dtype], parts)
    return tensors


def with_base(
    source: str, stored: Mapping[str, View], config: DonorConfig, hub_kwargs: Mapping[str, Any]
) -> dict[str, FileTensor]:
    """`assembled`, with the layers of the base, whose digest is compared.

    Args:
        source: The donor, for errors.
        stored: From `open_tensors`.
        config: The donor's.
        hub_kwargs: `token`, `cache_dir`, …

    Raises:
        CorruptDonorError: As in `assembled`.
        IncompatibleDonorError: The base has other layers than those that the delta was made of.
        OSError: The base cannot be read.
    """
    tensors = assembled(stored, config)
    restored = {name: tensor for name, tensor in tensors.items() if isinstance(tensor, Restored)}
    if not restored:
        return tensors
    delta = Delta.of(config)
    base, layers = delta.open_base(config, restored, hub_kwargs)
    if digest(layers) != delta.base_digest:
        raise IncompatibleDonorError(
            f"{source} is a delta of layers {interval(config.span)} of {base.name}, which are not the layers that it "
            f"was made with (digest {delta.base_digest:.16}…); name those in config.json under delta"
        )
    problems = [f"unexpected {name}" for name in restored if name not in layers]
    for name in restored.keys() & layers.keys():
        found, expected = tuple(restored[name].shape), tuple(layers[name].shape)
        problems += [f"{name} has shape {found}, expected {expected}"] if found != expected else []
    refuse(source, problems)
    return tensors | {name: replace(tensor, base=layers[name]) for name, tensor in restored.items()}
