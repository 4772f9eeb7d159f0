"""What differs between the releases of transformers and huggingface_hub that not_hf runs with.

One function, or one piece of data, for each difference; nothing else in the package asks which release it runs with.
The oldest releases are those of `constraints-lowest.txt`. What is private in all of them stands in `upstream.py`.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import logging
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import constants, is_offline_mode, model_info
from huggingface_hub.errors import HfHubHTTPError, HTTPError, OfflineModeIsEnabled
from huggingface_hub.file_download import REGEX_COMMIT_HASH, repo_folder_name
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import LinearAttentionLayer
from transformers.utils import hub as transformers_hub

from not_hf.architecture.tables import OVERRIDES, PER_LAYER_LISTS


class Commit(str):
    """The hash of a commit that a revision was resolved to."""

    @property
    def resolved(self) -> str:
        """The hash, as a `ResolvedRevision` of huggingface_hub has it."""
        return str(self)


def cache_argument(model: nn.Module) -> str:
    """The argument of a model's `forward` that is its cache: some models of transformers 5.24 have renamed it."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def is_checkpointing(model: Any) -> bool:
    """Whether the layers of a model recompute their activations in the backward pass."""
    return bool(getattr(model, f"is_{_checkpointing(model)}"))


def stop_checkpointing(model: Any) -> None:
    """Have layers keep their activations, and embeddings give no gradients that checkpointing had asked for."""
    getattr(model, f"{_checkpointing(model)}_disable")()
    model.disable_input_require_grads()


def _checkpointing(model: Any) -> str:
    """What it is called in the methods of models: transformers 5.24 has renamed it."""
    return (
        "activation_checkpointing" if hasattr(model, "activation_checkpointing_disable") else "gradient_checkpointing"
    )


def pin_revision(
    source: str,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    local_files_only: bool = False,
    cache_dir: str | os.PathLike[str] | None = None,
) -> str | None:
    """Resolve a revision to the commit that it names now, as `resolve_revision` of transformers 5.18 and later does.

    The Hub is asked, and its answer is noted in the cache; where it cannot be reached, that note is read.

    Returns:
        A `Commit`; the revision as it came, if `source` is a folder, or if what then reads the repo should say why it
        cannot be resolved.
    """
    if os.path.exists(source):
        return revision
    if revision is not None and REGEX_COMMIT_HASH.fullmatch(revision):
        return Commit(revision)
    try:
        repo = Path(cache_dir or constants.HF_HUB_CACHE, repo_folder_name(repo_id=source, repo_type="model"))
        noted = repo.expanduser() / "refs" / (revision or constants.DEFAULT_REVISION)
        if not (local_files_only or is_offline_mode()):
            try:
                commit = Commit(model_info(source, revision=revision, token=token).sha)
                with contextlib.suppress(OSError):  # the cache cannot be written to
                    noted.parent.mkdir(parents=True, exist_ok=True)
                    noted.write_text(commit)
                return commit
            except HfHubHTTPError as error:
                if error.response.status_code < 500:  # an answer: no such revision, or no access
                    raise
            except (HTTPError, OfflineModeIsEnabled):
                pass
        commit = Commit(noted.read_text().strip())
    except (OSError, ValueError):
        return revision
    return commit if REGEX_COMMIT_HASH.fullmatch(commit) else revision


# transformers has one since 5.18
resolve_revision: Any = getattr(transformers_hub, "resolve_revision", pin_revision)


def pinned_file_kwargs(revision: str | None) -> dict[str, str]:
    """How `cached_file` is told to look into the cache first, for what a commit lacks too; newer ones do so anyway."""
    return {"_commit_hash": revision} if isinstance(revision, Commit) else {}


# Whether caches follow a stack of layers with states: tried with 5.24; those of 5.6 do not
CACHES_FOLLOW_STATES = hasattr(LinearAttentionLayer, "is_croppable")


def overridden_keys(config: PreTrainedConfig) -> set[str] | None:
    """The keys for which a config gives layers values of their own, by `per_layer_config`; `None` if it does not.

    Older releases do not.
    """
    spec = vars(config).get("_heterogeneity_spec")
    return None if spec is None else set(spec.explicit_per_layer_attributes)


def values_of_layer(config: PreTrainedConfig, i: int, keys: Iterable[str]) -> dict[str, Any]:
    """The values of a layer, which are its own or those of the whole config; and what modules it does without."""
    layer = config.per_layer_config[i]
    skipped = getattr(layer, "skip", None)
    return {key: getattr(layer, key) for key in keys} | ({"skip": skipped} if skipped else {})


# Until 5.17 transformers misreads `rope_parameters` by layer type where the stack lacks one of their types
_NEEDS_ALL_TYPES = not hasattr(PreTrainedConfig, "nested_rope_parameter_keys")


def make_config(kind: type[PreTrainedConfig], values: Mapping[str, Any], is_span: bool = True) -> PreTrainedConfig:
    """Make a native config of its values.

    Args:
        kind: The class of the config.
        values: Those of a stack that may lack some of the base's layer types.
        is_span: Keep the type of the last layer, which the class may change to that in which a whole stack ends.
    """
    rope, types, count = (values.get(key) for key in ("rope_parameters", "layer_types", "num_hidden_layers"))
    if not (isinstance(types, list) and types and len(types) == count):
        return kind(**values)
    more: list[str] = []  # types of layers behind these, with which the class takes these as they are
    if _NEEDS_ALL_TYPES and isinstance(rope, dict):
        lacking = [key for key, each in rope.items() if isinstance(each, dict) and key not in types]
        more = [*lacking, types[-1]] if lacking else []
    config = _longer_config(kind, values, more)
    last = config.layer_types[-1]
    if is_span and last != types[-1]:
        more = [*more[:-1], last]
        config = _longer_config(kind, values, more)
    if more:
        keys = overridden_keys(config)
        own = {n: values_of_layer(config, n, keys) for n in range(count)} if keys else {}
        for key in _lists(values):
            setattr(config, key, getattr(config, key)[: -len(more)])
        config.num_hidden_layers = count
        if keys is not None:
            setattr(config, OVERRIDES, own)
        if not is_span:
            config.layer_types[-1] = last
    return config


def _longer_config(kind: type[PreTrainedConfig], values: Mapping[str, Any], types: list[str]) -> PreTrainedConfig:
    """Make a native config of its values, which it may change, with more layers of these types behind."""
    longer = {key: each + [each[-1]] * len(types) for key, each in _lists(values).items()}
    longer["layer_types"] = [*values["layer_types"], *types]
    longer["num_hidden_layers"] = values["num_hidden_layers"] + len(types)
    logger = logging.getLogger(kind.__module__)
    logger.addFilter(_is_not_about_last_layer)
    try:
        return kind(**copy.deepcopy({**values, **longer}))
    finally:
        logger.removeFilter(_is_not_about_last_layer)


def _is_not_about_last_layer(record: logging.LogRecord) -> bool:
    return "Last layer must" not in record.getMessage()


def _lists(values: Mapping[str, Any]) -> dict[str, list[Any]]:
    """The lists with an entry per layer among the values of a config."""
    count = values["num_hidden_layers"]
    return {key: each for key in PER_LAYER_LISTS if isinstance(each := values.get(key), list) and len(each) == count}


@contextlib.contextmanager
def of_dtype(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Have a model without parameters tell a dtype inside the block: older releases ask for it to make a mask."""
    model.register_parameter("_of_dtype", nn.Parameter(torch.empty(0, dtype=dtype)))
    try:
        yield
    finally:
        del model._of_dtype
