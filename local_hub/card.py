"""What the Hub reads out of a README: metadata, search tags, complaints."""

import re
from collections.abc import Iterable
from typing import Any

import yaml

_FRONT_MATTER = re.compile(r"\A(?:\ufeff)?\s*---[ \t]*\r?\n(.*?)\r?\n?---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
_RELATIONS = ("adapter", "finetune", "merge", "quantized")
_DATASET_FACETS = ("language", "license", "multilinguality", "size_categories", "task_categories", "task_ids")

# Metadata keys the Hub checks, by the shape it demands.
_TEXT = ("base_model_relation", "library_name", "model_name", "pipeline_tag")
_TEXT_OR_LIST = ("base_model", "datasets", "language", "license", "metrics")
_LIST = ("model-index", "tags", "task_categories")


def front_matter(readme: str) -> str | None:
    """The YAML block on top of a README, or None."""
    match = _FRONT_MATTER.match(readme)
    return match[1] if match else None


def card_data(readme: str) -> dict[str, Any]:
    """The metadata of a README, empty where there is none that can be read."""
    try:
        data = yaml.safe_load(front_matter(readme) or "")
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def check_card(readme: str) -> tuple[list[str], list[str]]:
    """What the Hub finds wrong with a README's metadata: errors, which refuse it, and warnings."""
    block = front_matter(readme)
    if block is None:
        return [], ["empty or missing yaml metadata in repo card"]
    try:
        data = yaml.safe_load(block)
    except yaml.YAMLError as error:
        return [f"invalid yaml metadata: {error}"], []
    if not isinstance(data, dict):
        return ["yaml metadata must be a mapping"], []
    errors = [f'"{key}" must be a string' for key in _TEXT if not _is(data.get(key), str)]
    errors += [f'"{key}" must be a string or an array' for key in _TEXT_OR_LIST if not _is(data.get(key), str, list)]
    errors += [f'"{key}" must be an array' for key in _LIST if not _is(data.get(key), list)]
    errors += [
        f'"{key}[{index}]" must be a string'
        for key in (*_TEXT_OR_LIST, "tags")
        for index, item in enumerate(_listed(data.get(key)))
        if not isinstance(item, str)
    ]
    if isinstance(data.get("base_model_relation"), str) and data["base_model_relation"] not in _RELATIONS:
        errors.append(f'"base_model_relation" must be one of [{", ".join(_RELATIONS)}]')
    return errors, []


def library_name(card: dict[str, Any], paths: Iterable[str], config: dict[str, Any]) -> str | None:
    """The library a model is for: what its card says, else what its files show."""
    if isinstance(card.get("library_name"), str):
        return card["library_name"]
    if "adapter_config.json" in paths:
        return "peft"
    return "transformers" if "model_type" in config else None


def model_tags(card: dict[str, Any], paths: Iterable[str], config: dict[str, Any]) -> list[str]:
    """Everything a model can be found by: tags of its card, and those the Hub adds itself."""
    library = library_name(card, paths, config)
    formats = ["safetensors"] if any(path.endswith(".safetensors") for path in paths) else []
    found = [
        library,
        *formats,
        config.get("model_type"),
        *_listed(card.get("tags")),
        card.get("pipeline_tag"),
    ]
    found += _listed(card.get("language"))
    found += [f"dataset:{name}" for name in _listed(card.get("datasets"))]
    found += _base_model_tags(card, paths, library)
    found += [f"license:{name}" for name in _listed(card.get("license"))]
    return _unique([*found, "region:us"])


def dataset_tags(card: dict[str, Any]) -> list[str]:
    """Everything a dataset can be found by."""
    facets = [f"{facet}:{name}" for facet in _DATASET_FACETS for name in _listed(card.get(facet))]
    return _unique([*facets, *_listed(card.get("tags")), "region:us"])


def _base_model_tags(card: dict[str, Any], paths: Iterable[str], library: str | None) -> list[str]:
    """`base_model:<id>` and `base_model:<relation>:<id>`; guesses the relation a card leaves out."""
    bases = _listed(card.get("base_model"))
    if card.get("base_model_relation") in _RELATIONS:
        relation = card["base_model_relation"]
    elif library == "peft":
        relation = "adapter"
    elif any(path.endswith(".gguf") for path in paths):
        relation = "quantized"
    else:
        relation = "merge" if len(bases) > 1 else "finetune"
    return [tag for base in bases for tag in (f"base_model:{base}", f"base_model:{relation}:{base}")]


def _is(value: Any, *types: type) -> bool:
    return value is None or isinstance(value, types)


def _listed(value: Any) -> list[Any]:
    if value is None:
        return []
    return value if isinstance(value, list) else [value]


def _unique(tags: Iterable[str | None]) -> list[str]:
    return list(dict.fromkeys(str(tag) for tag in tags if tag))
