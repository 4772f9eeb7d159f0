"""`import_checkpoint`: organs from pickled checkpoints, whatever their layout.

A file is read as tensors by dotted names. If a name ends like that of a tensor in the base's layers, what comes before
is where the file keeps its layers, and the last number in that is the layer's number.
"""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import cached_file

from not_hf.architecture.part_names import ALL, Modules
from not_hf.architecture.twin import meta_twin
from not_hf.architecture.upstream import require_known
from not_hf.donor.cutting import Span, cut_config, open_base
from not_hf.donor.modeling import DonorModel
from not_hf.donor.pickles import read_tensors
from not_hf.errors import CorruptDonorError, NotHFError, reading_repo, some
from not_hf.hub.checkpoint import FLOAT_DTYPES
from not_hf.limits import MAX_VALUES_PER_STORED

DONOR_LAYERS = "donor_layers.pt"  # the file name of the paper's author
# Buffers of layers in older releases of transformers, which are computed now; a causal mask was a `bias`.
OLD_BUFFERS = ("masked_bias", "causal_mask", "inv_freq", "cos_cached", "sin_cached")

_FLOATS = tuple(getattr(torch, name) for name in FLOAT_DTYPES.values())
_NUMBERED = re.compile(r"((?:.*(?:layer|block)s?[_-]?)?)([0-9]{1,6})")  # 4, layer_4, layer4

Layer = dict[str, torch.Tensor]  # by name in the layer
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Naming:
    """How a file names the tensors of a set of layers: `before`, layer number, `after`, name in the layer."""

    before: str
    after: str
    is_numbered: bool

    @classmethod
    def of(cls, lead: str) -> Naming:
        """Parse what comes before a tensor's name in its layer: empty, or ending with a dot."""
        *parts, _ = lead.split(".")
        for n in reversed(range(len(parts))):
            if match := _NUMBERED.fullmatch(parts[n]):
                outer, inner = (".".join([*some, ""]) for some in (parts[:n], parts[n + 1 :]))
                return cls(outer + match[1], f".{inner}", True)
        return cls(lead, "", False)

    def __str__(self) -> str:
        return f"{self.before}*{self.after}".strip(".")

    def name(self, number: int, key: str) -> str:
        """Return the name of a tensor in the file."""
        return f"{self.before}{number if self.is_numbered else ''}{self.after}{key}"

    def layers(self, tensors: Mapping[str, torch.Tensor]) -> dict[int, Layer]:
        """Collect the layers with this naming, by number; 0 if they have none."""
        number = "([0-9]{1,6})" if self.is_numbered else "()"
        pattern = re.compile(f"{re.escape(self.before)}{number}{re.escape(self.after)}(.+)", re.DOTALL)
        found: dict[int, Layer] = {}
        for name, tensor in tensors.items():
            if match := pattern.fullmatch(name):
                found.setdefault(int(match[1] or 0), {})[match[2]] = tensor
        return dict(sorted(found.items()))


def import_checkpoint(
    path_or_repo: str | os.PathLike[str],
    base: str | os.PathLike[str] | PreTrainedModel,
    layers: Sequence[int] | None = None,
    subfolder: str | None = None,
    filename: str = DONOR_LAYERS,
    *,
    position: int | None = None,
    mode: str = "insert",
    init: str = "copy",
    modules: Modules = ALL,
    domain: str | None = None,
    dtype: str | torch.dtype = "auto",
    revision: str | None = None,
    base_revision: str | None = None,
    **hub_kwargs: Any,
) -> DonorModel:
    """Turn layers that were saved with `torch.save` into a donor.

    The layers may be a list of state dicts, a dict by layer number, or flat names with any prefix, nested under any
    keys: they are found by the names and shapes of tensors in the base's layers. The file is read as tensors only; a
    pickle that would run code is refused. The organs of the paper (arXiv 2601.13580) are published in such files.

    Args:
        path_or_repo: The file; or a folder or Hub ID that holds it.
        base: The model that the layers are from: folder, Hub ID or live model. Only its config is read.
        layers: Half-open span `(i, j)` of the base's layers. `None`: as the file numbers them, if not from 0.
        subfolder: Folder within `path_or_repo`.
        filename: Name of the file.
        position: As in `DonorModel.from_base`, like `mode`, `init`, `domain` and `dtype`.
        modules: What the file holds of each layer, as there.
        revision: Branch, tag or commit of the repo that holds the file.
        base_revision: Branch, tag or commit of the base's repo.
        **hub_kwargs: `token`, `cache_dir`, `force_download`, `local_files_only` for both repos.

    Raises:
        CorruptDonorError: The file is not a pickle of tensors, holds no layers of the base or several sets of them,
            or a tensor is missing, unexpected, mis-shaped, non-finite or not floating-point.
        NotHFError: `layers` is needed, or contradicts the file; another argument is out of range.
        UnsupportedArchitectureError: As in `DonorModel.from_base`.
        OSError: The file or the base's config cannot be read.

    Examples:
        >>> import tempfile, torch
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> from not_hf import import_checkpoint
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=9, n_embd=8, n_layer=4, n_head=2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     torch.save([layer.state_dict() for layer in base.transformer.h[1:3]], f"{folder}/donor_layers.pt")
        ...     donor = import_checkpoint(folder, base, layers=(1, 3))
        >>> donor.config.layers
        [1, 3]
    """
    require_known(hub_kwargs)
    base_kwargs = {} if isinstance(base, PreTrainedModel) else dict(hub_kwargs)
    if base_revision is not None:
        base_kwargs["revision"] = base_revision
    source = open_base(base, **base_kwargs)
    # checks the arguments before the download
    span = None if layers is None else cut_config(source, layers, position, mode, init, modules=modules).span
    file = _fetch(os.fspath(path_or_repo), subfolder, filename, revision=revision, **hub_kwargs)
    name = file if os.path.exists(path_or_repo) else os.path.join(path_or_repo, subfolder or "", filename)
    shapes: dict[str, set[Shape]] = {}
    states = [layer.state_dict() for layer in meta_twin(source.config).stack.layers]
    for state in states:
        for key, tensor in state.items():
            shapes.setdefault(key, set()).add(tuple(tensor.shape))

    tensors = read_tensors(file, name)
    naming = _find_layers(tensors, shapes, name)
    found = naming.layers(tensors)
    config = cut_config(source, _span(list(found), span, name), position, mode, init, modules=modules)
    config.domain = domain
    if modules == ALL:
        _require_whole(list(found.values()), states, name)
    num_values = sum(tensor.numel() for layer in found.values() for tensor in layer.values())
    if num_values > MAX_VALUES_PER_STORED * os.path.getsize(file):
        raise CorruptDonorError(f"{name} refers to its values many times: {num_values:,} in all; torch.save copies")
    organ_tensors = {
        f"{source.path}.{n}.{key}": _owned(tensor, f"{name}: {naming.name(number, key)}")
        for n, (number, layer) in enumerate(found.items())
        for key, tensor in layer.items()
        if key in shapes or not _is_old_buffer(key, tensor)
    }
    return DonorModel.from_tensors(source, config, organ_tensors, dtype, name=f"{name}, layers at {naming}")


def _fetch(source: str, subfolder: str | None, filename: str, **hub_kwargs: Any) -> str:
    """Return the local path of the file."""
    if os.path.isfile(source):
        if subfolder:
            raise NotHFError(f"{source} is a file and has no subfolder {subfolder!r}; give its folder instead")
        return source
    with reading_repo(source):
        return str(cached_file(source, filename, subfolder=subfolder, **hub_kwargs))


def _find_layers(tensors: Mapping[str, torch.Tensor], shapes: Mapping[str, Collection[Shape]], name: str) -> Naming:
    """Find the one naming under which the tensors of a file have names and `shapes` of those in the base's layers."""
    depth = max(key.count(".") for key in shapes) + 1
    fits: dict[Naming, dict[str, bool]] = {}  # for each: names in a layer, and whether any tensor has the shape
    for path, tensor in tensors.items():
        parts = path.split(".")
        for n in range(max(0, len(parts) - depth), len(parts)):
            if (key := ".".join(parts[n:])) in shapes:
                found = fits.setdefault(Naming.of(path.removesuffix(key)), {})
                found[key] = found.get(key, False) or tuple(tensor.shape) in shapes[key]
                break
    if not fits:
        raise CorruptDonorError(
            f"{name} holds no layers of this base: expected tensors with names such as {some(list(shapes))}, "
            f"got {some(list(tensors)) or 'none'}"
        )
    score = {naming: sum(found.values()) for naming, found in fits.items()}
    best = max(fits, key=lambda naming: (score[naming], len(fits[naming])))
    # a norm outside the layers may be named like one in them; half a layer is not a coincidence
    rivals = [naming for naming in fits if score[best] and 2 * score[naming] >= score[best]]
    if len(rivals) > 1:
        raise CorruptDonorError(
            f"{name} holds several sets of layers of this base, at {' and at '.join(map(str, rivals))}; "
            "torch.save only the one to import"
        )
    return best


def _span(numbers: Sequence[int], wanted: Span | None, name: str) -> Span:
    """Find the span of a file's layers in the base, from their numbers in the file and from the wanted span."""
    first, k = numbers[0], len(numbers)
    if numbers[-1] - first != k - 1:
        raise CorruptDonorError(f"{name} holds layers {', '.join(map(str, numbers))}, which are not consecutive")
    if wanted is None and first == 0:
        raise NotHFError(
            f"{name} does not number its {k} layers as in the base; "
            f"give their span: layers=(i, i + {k}), or --layers I:J on the command line"
        )
    if wanted is not None and (wanted[1] - wanted[0] != k or first not in (0, wanted[0])):
        raise NotHFError(f"{name} holds layers {first} to {numbers[-1]}, which contradict layers={wanted}")
    return wanted or (first, first + k)


def _require_whole(layers: Sequence[Layer], states: Sequence[Layer], name: str) -> None:
    """Refuse layers of a file that all lack the same tensors of any in the base, whose `states` these are."""
    names = layers[0].keys()
    if all(layer.keys() == names for layer in layers) and all(names < state.keys() for state in states):
        raise CorruptDonorError(
            f"{name} holds only parts of each layer ({some(sorted(names))}); say which: modules='outputs' or names of "
            "modules, with mode='replace'; --modules and --mode on the command line"
        )


def _is_old_buffer(key: str, tensor: torch.Tensor) -> bool:
    *_, leaf = key.split(".")
    return leaf in OLD_BUFFERS or (leaf == "bias" and tensor.ndim == 4)


def _owned(tensor: torch.Tensor, name: str) -> torch.Tensor:
    """Check and copy a tensor: the file may change, and tensors in it may share memory."""
    if tensor.dtype not in _FLOATS:
        raise CorruptDonorError(f"{name} is {tensor.dtype}, not floating-point")
    if tensor.layout != torch.strided or tensor.is_meta:
        raise CorruptDonorError(f"{name} is not a dense tensor with values")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise CorruptDonorError(f"{name} has shape {tuple(tensor.shape)} but fewer values (an expanded tensor)")
    if tensor.numel() == 0:
        raise CorruptDonorError(f"{name} is empty, shape {tuple(tensor.shape)}")
    return tensor.detach().clone(memory_format=torch.contiguous_format)
