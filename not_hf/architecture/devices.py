"""Recipients that accelerate spreads over devices or offloads: where layers run, and the device map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook, add_hook_to_module
from torch import nn
from transformers import PreTrainedModel

from not_hf.architecture.upstream import dispatch_hooks

DeviceMap = dict[str, Any]  # accelerate's: module name to "cpu", "disk", a device or its index


def execution_device(layer: nn.Module) -> torch.device | None:
    """The device on which accelerate runs a layer, wherever its weights are; `None` if it is not dispatched."""
    hook = next(_align_hooks(layer), None)
    return None if hook is None else torch.device(hook.execution_device)


def input_device(model: PreTrainedModel) -> torch.device:
    """The device on which a model takes token ids, also where accelerate keeps its first weights elsewhere."""
    device = model.device
    return (device.type == "meta" and execution_device(model.get_input_embeddings())) or device


def follow(layer: nn.Module, neighbour: nn.Module, skip_keys: str | Sequence[str] | None) -> None:
    """Have accelerate move a layer's inputs to the device on which its neighbour runs.

    Args:
        layer: A layer of an organ; its weights are on that device already, and stay there.
        neighbour: A layer of the recipient.
        skip_keys: Names of arguments that are not moved, such as the cache.
    """
    if (device := execution_device(neighbour)) is not None:
        add_hook_to_module(layer, AlignDevicesHook(execution_device=device, skip_keys=skip_keys))


def spliced_device_map(device_map: DeviceMap, path: str, origins: Sequence[int | torch.device]) -> DeviceMap:
    """The device map of a spliced model.

    Args:
        device_map: The map of the base.
        path: Path of the list of layers.
        origins: For each layer of the new stack, its index in the base, or the device of an organ's layer.

    Returns:
        A new map; an equal one if it has no entries for single layers.
    """
    inside = {key: place for key, place in device_map.items() if key.startswith(f"{path}.")}
    spliced = {key: place for key, place in device_map.items() if key not in inside}
    for n, origin in enumerate(origins if inside else ()):
        name = f"{path}.{n}"
        if isinstance(origin, torch.device):
            spliced[name] = str(origin) if origin.index is None else origin.index
        else:
            was = f"{path}.{origin}"
            spliced |= {name + key[len(was) :]: p for key, p in inside.items() if f"{key}.".startswith(f"{was}.")}
    return spliced


def _align_hooks(layer: nn.Module) -> Iterator[AlignDevicesHook]:
    for hook in dispatch_hooks(layer):
        for one in hook.hooks if isinstance(hook, SequentialHook) else [hook]:
            if isinstance(one, AlignDevicesHook) and one.execution_device is not None:
                yield one
