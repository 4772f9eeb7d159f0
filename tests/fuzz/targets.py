"""What is done with hostile files: all that reads a stranger's file, one target for each kind of file."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from hypothesis import strategies as st
from safetensors import safe_open

from fuzz import inputs
from not_hf import DonorConfig, DonorModel, OrganSource, check_compatibility, check_donor, compose, import_checkpoint
from not_hf.architecture.stack import find_stack
from not_hf.cards.common import updated
from not_hf.cards.donor import donor_card
from not_hf.cards.license import base_license
from not_hf.donor.loading import refuse
from not_hf.hub.checkpoint import open_checkpoint, open_file
from not_hf.hub.partial_download import list_tensors
from testing.cards import make_config, markup
from testing.models import tiny_config, tiny_model

SPAN = (1, 3)
DELTA = "model.delta.safetensors"
MODEL_TYPES = ("llama", "gpt2", "gpt_neo", "gemma3_text", "qwen3_moe", "mixtral")
LOCALLY = {"local_files_only": True}  # the network is another matter


class Target(NamedTuple):
    """A kind of file."""

    inputs: st.SearchStrategy[bytes]
    run: Callable[[bytes], Any]
    runs_code: bool = True  # native classes of transformers are imported when they are first named


def make_targets(folder: Path) -> dict[str, Target]:
    """Write sound files into a folder, which the inputs then replace."""
    for model_type in MODEL_TYPES:
        base = tiny_model(model_type)
        base.save_pretrained(folder / f"base-{model_type}")
        DonorModel.from_base(base, SPAN, domain="Bible").save_pretrained(folder / model_type)
    configs = [_config_of(folder / model_type) for model_type in MODEL_TYPES]
    configs[0] |= {"datasets": ["me/kjv"], "metrics": {"domain_perplexity": {"before": 24.0, "after": 18.0}}}
    donors = [folder / "llama", OrganSource("law", folder / "llama", position=0)]
    compose(donors, folder / "base-llama").save_pretrained(folder / "composition")
    DonorModel.from_pretrained(folder / "llama").save_pretrained(folder / "sharded", max_shard_size="10KB")
    DonorModel.from_pretrained(folder / "llama").save_pretrained(folder / "weights")
    config = folder / "weights" / "config.json"  # without digests, which every change of the weights would contradict
    config.write_text(json.dumps({k: v for k, v in json.loads(config.read_text()).items() if k != "digests"}))
    DonorModel.from_base(folder / "base-llama", SPAN).save_pretrained(folder / "delta", delta="low_rank", rank=2)
    delta = {key: value for key, value in _config_of(folder / "delta").items() if key != "digests"}
    index = json.loads((folder / "sharded" / "model.safetensors.index.json").read_text())
    files = _like(folder / "weights" / "model.safetensors")
    card = (folder / "llama" / "README.md").read_bytes()
    return {
        "config": Target(inputs.json_files(configs), _run_config(folder)),
        "donor": Target(inputs.json_files(configs, most=2), _run_donor(folder)),
        "composition": Target(inputs.json_files([_config_of(folder / "composition")]), _run_composition(folder)),
        "index": Target(inputs.json_files([index]), _run_index(folder)),
        "header": Target(files, _run_header(folder), runs_code=False),
        "weights": Target(files, _run_weights(folder), runs_code=False),
        "delta": Target(inputs.json_files([delta, delta["delta"]], most=2), _run_delta(folder, delta)),
        "delta-weights": Target(_like(folder / "delta" / DELTA), _run_delta_weights(folder, delta), runs_code=False),
        "pickle": Target(inputs.pickle_files(_pickles()), _run_pickle(folder), runs_code=False),
        "card": Target(inputs.card_files([card]), _run_card(folder), runs_code=False),
    }


def _config_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "config.json").read_text())


def _like(file: Path) -> st.SearchStrategy[bytes]:
    """Files like a sound one."""
    content = file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return inputs.safetensors_files([json.loads(content[8 : 8 + length])], len(content) - 8 - length)


def _pickles() -> list[bytes]:
    layers = [dict(layer.state_dict()) for layer in find_stack(tiny_model("llama")).layers[slice(*SPAN)]]
    found = []
    for content in (layers, {"layers": {1: layers[0], 2: layers[1]}, "config": {"n": 3}}):
        for is_zip in (True, True, False):
            file = io.BytesIO()
            torch.save(content, file, _use_new_zipfile_serialization=is_zip)
            found.append(file.getvalue())
    return found


def _run_config(folder: Path) -> Callable[[bytes], Any]:
    place = folder / "config"
    place.mkdir()

    def run(content: bytes) -> None:
        (place / "config.json").write_bytes(content)
        config = DonorConfig.from_pretrained(place)
        config.check()
        assert markup(donor_card(config, 1, 2).text) == []

    return run


def _run_donor(folder: Path) -> Callable[[bytes], Any]:
    place = folder / "donor"
    place.mkdir()

    def run(content: bytes) -> None:
        (place / "config.json").write_bytes(content)
        config = DonorConfig.from_pretrained(place)
        spec = config.check()
        known = spec.base.model_type in MODEL_TYPES
        check_compatibility(config, tiny_config(spec.base.model_type if known else "llama"))
        weights = folder / (spec.base.model_type if known else "llama")
        donor = DonorModel.from_pretrained(weights, config=config)
        donor.save_pretrained(folder / "saved")  # what was loaded can be saved
        DonorConfig.from_pretrained(folder / "saved").check()

    return run


def _run_composition(folder: Path) -> Callable[[bytes], Any]:
    place, recipient = folder / "composition", tiny_config("llama")

    def run(content: bytes) -> None:
        (place / "config.json").write_bytes(content)
        refuse("composition", check_donor(place, recipient, **LOCALLY))
        plan = compose([place], folder / "base-llama", **LOCALLY)
        assert markup(donor_card(plan.config(), 1, 2).text) == []

    return run


def _run_index(folder: Path) -> Callable[[bytes], Any]:
    place = folder / "sharded"

    def run(content: bytes) -> None:
        (place / "model.safetensors.index.json").write_bytes(content)
        list_tensors(place)
        open_checkpoint(place)

    return run


def _run_header(folder: Path) -> Callable[[bytes], Any]:
    file = folder / "header.safetensors"

    def run(content: bytes) -> None:
        file.write_bytes(content)
        views = open_file(str(file))
        with safe_open(file, "pt") as theirs:  # what not_hf accepts, safetensors accepts
            assert set(theirs.keys()) == set(views)

    return run


def _run_weights(folder: Path) -> Callable[[bytes], Any]:
    place, recipient = folder / "weights", tiny_config("llama")

    def run(content: bytes) -> None:
        (place / "model.safetensors").write_bytes(content)
        refuse("donor", check_donor(place, recipient, **LOCALLY))
        DonorModel.from_pretrained(place)

    return run


def _run_delta(folder: Path, sound: dict[str, Any]) -> Callable[[bytes], Any]:
    place = folder / "delta-config"
    shutil.copytree(folder / "delta", place)

    def run(content: bytes) -> None:
        with contextlib.suppress(ValueError):
            if isinstance(values := json.loads(content), dict) and "model_type" not in values:  # of the delta alone
                content = json.dumps(sound | {"delta": values}).encode()
        (place / "config.json").write_bytes(content)
        config = DonorConfig.from_pretrained(place)
        config.check()
        assert markup(donor_card(config, 1, 2).text) == []
        DonorModel.from_pretrained(place, **LOCALLY)

    return run


def _run_delta_weights(folder: Path, sound: dict[str, Any]) -> Callable[[bytes], Any]:
    place, recipient = folder / "delta", tiny_config("llama")
    (place / "config.json").write_text(json.dumps(sound))

    def run(content: bytes) -> None:
        (place / DELTA).write_bytes(content)
        refuse("donor", check_donor(place, recipient, **LOCALLY))
        DonorModel.from_pretrained(place, **LOCALLY)

    return run


def _run_pickle(folder: Path) -> Callable[[bytes], Any]:
    file, base = folder / "donor_layers.pt", folder / "base-llama"

    def run(content: bytes) -> None:
        file.write_bytes(content)
        import_checkpoint(file, base, SPAN)

    return run


def _run_card(folder: Path) -> Callable[[bytes], Any]:
    place, new = folder / "card", donor_card(make_config())
    place.mkdir()

    def run(content: bytes) -> None:
        (place / "README.md").write_bytes(content)
        base_license(str(place))
        str(updated(place / "README.md", new))

    return run
