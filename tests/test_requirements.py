"""The releases that not_hf says it runs with: the same everywhere, and those that people serve and train with."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from testing import ROOT

# What the metadata of each package asks of those that not_hf needs too, on its own or through others.
# The pin of torch is left out: nothing but 2.13 was run, whose upper bound is that of not_hf.
PINS = {
    "vLLM 0.33.0": (
        "transformers>=5.16.1,<5.21.0 huggingface_hub>=1.31.0 tokenizers>=0.23.2 safetensors>=0.6.2 requests>=2.33.0 "
        "aiohttp>=3.14.4 filelock>=3.20.3 typing_extensions>=4.10 multidict>=6.9.1 certifi>=2026.10.19"
    ),
    "SGLang 0.5.23": "transformers==5.19.0 tokenizers==0.23.2 python-dateutil<3",
    "axolotl 0.19.0": (
        "transformers==5.16.1 huggingface_hub==1.17.0 datasets==4.8.4 accelerate==1.13.0 evaluate==0.4.1 "
        "tokenizers==0.23.1 hf_xet==1.4.3 typer==0.25.1 PyYAML==6.0.3 numpy>=2.1,<3.0 packaging==26.0 "
        "typing-extensions==4.15.0 fsspec==2025.10.0"  # the last one by way of s3fs and gcsfs
    ),
    "unsloth 2026.10.9": (
        "transformers>=4.52.4,!=5.0.0,!=5.1.0,<=5.17.0 datasets>=3.4.1,!=4.0.*,!=4.1.0,!=4.4.*,!=4.5.0,<5.0.0 "
        "huggingface_hub>=0.34.0 accelerate>=0.34.1 typer>=0.19.0 click>=8.0 certifi>=2026.10.19"
    ),
    "LLaMA-Factory 0.9.5": (
        "transformers>=4.55.0,!=4.57.0,<=5.6.0 datasets>=2.16.0,<=4.0.0 accelerate>=1.3.0,<=1.11.0 "
        "huggingface_hub>=0.33.5,<2.0 pandas<3.0 typer<1.0 numpy<3.0 pyyaml<7.0"  # these by way of gradio 5.50
    ),
}


def pip(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900)


def pinned(file: str) -> dict[str, str]:
    """The releases in a file of constraints, by package."""
    lines = (ROOT / file).read_text("utf-8").splitlines()
    pins = (Requirement(line) for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


def lower_bounds(requirements: list[str]) -> dict[str, str]:
    found = {}
    for requirement in map(Requirement, requirements):
        for each in requirement.specifier:
            if each.operator == ">=":
                found[canonicalize_name(requirement.name)] = each.version
    return found


def test_lower_bounds_are_those_that_the_suite_runs_with():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    bounds = lower_bounds(project["dependencies"])
    tested = lower_bounds(project["optional-dependencies"]["dev"])
    pins = pinned("constraints-lowest.txt")
    assert bounds.keys() < pins.keys()
    for name, release in pins.items():
        assert Version(release) == Version((bounds | tested)[name]), name
    told = (ROOT / "docs" / "install.md").read_text("utf-8")
    for name in ("torch", "transformers", "huggingface_hub", "datasets", "accelerate"):
        assert f"{name} {bounds[canonicalize_name(name)]}" in told, name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    probe = pip("download", "--quiet", "--no-deps", "--no-cache-dir", "--dest", folder / "probe", "hatchling>=1.27")
    if probe.returncode:
        pytest.skip(f"no package index can be reached: {probe.stderr.strip().splitlines()[-1]}")
    built = pip("wheel", "--quiet", "--no-deps", "--wheel-dir", folder, ROOT)
    assert built.returncode == 0, built.stderr
    return next(folder.glob("*.whl"))


@pytest.mark.index
@pytest.mark.parametrize("stack", PINS)
def test_it_installs_beside(stack, wheel, tmp_path):
    """By pip's resolver, which fetches metadata and installs nothing."""
    report, pins = tmp_path / "report.json", PINS[stack].split()
    how = ["--dry-run", "--quiet", "--ignore-installed", "--report", report, "--constraint", ROOT / "constraints.txt"]
    done = pip("install", *how, wheel, *pins)
    assert done.returncode == 0, done.stderr
    found = {
        canonicalize_name(each["metadata"]["name"]): each["metadata"]["version"]
        for each in json.loads(report.read_text())["install"]
    }
    for pin in map(Requirement, pins):
        assert pin.specifier.contains(found[canonicalize_name(pin.name)]), (pin, found[canonicalize_name(pin.name)])
