"""A base, two donors of it and a composition of the two, on the Hub and in a folder."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from not_hf import (
    OrganSource,
    TransplantedForCausalLM,
    compose,
)
from testing.donors import organ


@pytest.fixture(scope="session")
def base(base_repo) -> str:
    return base_repo("llama")


@pytest.fixture(scope="session")
def kjv(base) -> str:
    """Layers 1 and 2, inserted before layer 3."""
    organ(base, 1).push_to_hub("me/c-kjv")
    return "me/c-kjv"


@pytest.fixture(scope="session")
def law(base) -> str:
    """Layer 0, in its own place."""
    organ(base, 2, (0, 1), mode="replace").push_to_hub("me/c-law")
    return "me/c-law"


@pytest.fixture(scope="session")
def both(base, kjv, law, tmp_path_factory) -> Path:
    """A folder that refers to the two."""
    folder = tmp_path_factory.mktemp("both")
    compose([kjv, OrganSource("law", law, position=1)], base).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def one_by_one(base, kjv, law) -> TransplantedForCausalLM:
    """The same organs, loaded by hand."""
    model = TransplantedForCausalLM.from_pretrained(base, kjv, donor_name="c-kjv")
    model.load_donor(law, "law", position=1)
    return model


@pytest.fixture
def edited(both, tmp_path) -> Callable[..., Path]:
    """A copy of `both` with other entries."""

    def edit(*donors, **root) -> Path:
        folder = tmp_path / "edited"
        shutil.copytree(both, folder)
        config = json.loads((folder / "config.json").read_text())
        given = [entry(config["donors"]) if callable(entry) else entry for entry in donors]
        (folder / "config.json").write_text(json.dumps({**config, "donors": given or config["donors"], **root}))
        return folder

    return edit
