"""The documentation runs: the Python blocks of every page, on tiny stand-ins, and the examples in docstrings."""

from __future__ import annotations

import doctest
import importlib
import itertools
import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from datasets import interleave_datasets
from huggingface_hub import HfApi
from transformers import GPT2Config, GPT2ForSequenceClassification, GPT2LMHeadModel

import not_hf
from not_hf import DonorModel, load_text, pack
from testing import ROOT
from testing.models import tiny_tokenizer
from testing.releases import CACHES_TRL
from testing.shapes import VOCAB

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WRITTEN_FOR_PEOPLE = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md")]
LONG = [ROOT / "docs" / "guides" / f"{name}.md" for name in ("data", "evaluation", "training")]
WITH_EXAMPLES = [path for path in sorted((ROOT / "not_hf").rglob("*.py")) if ">>>" in path.read_text("utf-8")]

# What a page says, and what runs here instead.
STAND_INS = {
    "openai-community/": "me/",
    "block_length=256": "block_length=16",
    "max_steps=500": "max_steps=4, use_cpu=True",
    "save_steps=250": "save_steps=2",
    "logging_steps=10": "logging_steps=1",
    "rank=64": "rank=4",
    "budget=600": "budget=3",
    "num_train_epochs=3": "num_train_epochs=0.1, use_cpu=True",
}

pytestmark = pytest.mark.xdist_group("documentation")  # the stand-ins are made once


def blocks(page: Path) -> list[str]:
    return re.findall(r"```python\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def page_id(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


@pytest.fixture(scope="module")
def repos(hub, tmp_path_factory) -> Path:
    """`me/gpt2` and `me/gpt2-medium`: 12 layers each, of different width; a classifier; two donors; pickled layers."""
    folder = tmp_path_factory.mktemp("stand-ins")
    kinds = {
        "gpt2": (GPT2LMHeadModel, 32),
        "gpt2-medium": (GPT2LMHeadModel, 64),
        "gpt2-reviews": (GPT2ForSequenceClassification, 32),
    }
    for name, (kind, width) in kinds.items():
        config = GPT2Config(n_embd=width, n_head=4, n_layer=12, vocab_size=VOCAB, bos_token_id=1, eos_token_id=2)
        kind(config).save_pretrained(folder / name)
        tiny_tokenizer().save_pretrained(folder / name)
        HfApi().upload_folder(repo_id=HfApi().create_repo(f"me/{name}").repo_id, folder_path=folder / name)
    DonorModel.from_base("me/gpt2", (4, 7)).push_to_hub("me/gpt2-kjv")
    DonorModel.from_base("me/gpt2", (7, 9)).push_to_hub("me/gpt2-law")
    layers = list(GPT2LMHeadModel.from_pretrained(folder / "gpt2").transformer.h)[4:7]
    torch.save([layer.state_dict() for layer in layers], folder / "donor_layers.pt")
    HfApi().create_repo("me/layers")
    HfApi().upload_file(
        repo_id="me/layers", path_in_repo="donor_layers.pt", path_or_fileobj=folder / "donor_layers.pt"
    )
    return folder


@pytest.fixture
def stand_ins(repos, tmp_path, monkeypatch) -> None:
    """An empty folder to work in, with three texts; no line of the third occurs twice."""
    monkeypatch.chdir(tmp_path)
    Path("kjv.txt").write_text("w3 w4 w5 w6 w7\n" * 1000)
    Path("general.txt").write_text("w8 w9\n" * 300)
    Path("verses.txt").write_text("".join(f"w{3 + n % 80} w{3 + n // 80} w{n % 7 + 9}\n" for n in range(400)))


@pytest.mark.parametrize(
    "page",
    [
        pytest.param(page, id=page_id(page), marks=[pytest.mark.slow] if page in LONG else [])
        for page in PAGES
        if blocks(page)
    ],
)
def test_python_blocks_run(page, stand_ins, capsys):
    scope: dict = {}
    for block in blocks(page):
        if "import DonorDPOTrainer" in block and not CACHES_TRL:
            continue
        for said, instead in STAND_INS.items():
            block = block.replace(said, instead)
        exec(compile(block, page_id(page), "exec"), scope)
    if check := CHECKS.get(page_id(page)):
        check(scope, capsys.readouterr().out)


def readme(scope: dict, printed: str) -> None:
    assert type(scope["native"]) is GPT2LMHeadModel and scope["native"].config.num_hidden_layers == 15
    assert Path("gpt2-kjv-merged/config.json").is_file()
    assert "w" in printed


def training(scope: dict, printed: str) -> None:
    assert Path("runs/kjv/checkpoint-4/model.safetensors").stat().st_size < 200_000  # the organ only
    assert Path("runs/kjv/checkpoint-2").is_dir()
    assert Path("runs/kjv-cached/training_curve.png").is_file() and Path("kjv.png").is_file()
    assert "trainable params: 38,112" in printed


def compositions(scope: dict, printed: str) -> None:
    assert scope["model"].active_donors == ["gpt2-kjv", "law"]
    assert scope["model"].donor_config["law"].scale == 0.5


def sharing(scope: dict, printed: str) -> None:
    assert "me/gpt2-kjv" in printed and "me/gpt2-law" in printed
    assert Path("gpt2-kjv/README.md").is_file()
    assert isinstance(scope["donor"], DonorModel)


def deployment(scope: dict, printed: str) -> None:
    assert "model.safetensors" in {path.name for path in Path("gpt2-kjv-merged").iterdir()}
    assert "base_model_relation: merge" in Path("gpt2-kjv-merged/README.md").read_text("utf-8")
    assert "GPT2LMHeadModel 15 None" in printed


def mixtures(scope: dict, printed: str) -> None:
    """General text is mixed in as the page says, and a stream resumes."""
    expected = list(pack(load_text("kjv.txt"), tiny_tokenizer(), 16))
    for found in (scope["blocks"], scope["stream"]):
        mixed = list(found)
        assert [block for block in mixed if 8 not in block["input_ids"]] == expected
        assert len(expected) / 9 == pytest.approx(len(mixed) - len(expected), rel=0.35)
    assert len(scope["blocks"]) == len(expected) + len(expected) // 9

    def interleaved(general):
        return interleave_datasets([scope["domain"], general], probabilities=[0.9, 0.1], seed=0)

    stopped, resumed = scope["stream"], interleaved(scope["general"].repeat(None))
    list(itertools.islice(stopped, 100))
    resumed.load_state_dict(stopped.state_dict())
    assert list(resumed) == mixed[100:]
    short = list(interleaved(scope["general"].take(3).repeat(None)))
    assert [block for block in short if 8 not in block["input_ids"]] == expected and len(short) > len(expected) + 20


CHECKS: dict[str, Callable[[dict, str], None]] = {
    "README.md": readme,
    "docs/guides/training.md": training,
    "docs/guides/data.md": mixtures,
    "docs/guides/sharing.md": sharing,
    "docs/guides/compositions.md": compositions,
    "docs/guides/deployment.md": deployment,
}


@pytest.mark.parametrize("path", WITH_EXAMPLES, ids=page_id)
def test_docstring_examples_run(path, stand_ins):
    module = importlib.import_module(page_id(path).removesuffix(".py").removesuffix("/__init__").replace("/", "."))
    if module.__name__.endswith("trl_trainers") and not CACHES_TRL:
        pytest.skip("it needs a newer TRL")
    result = doctest.testmod(module, optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert not result.failed


@pytest.mark.parametrize("name", sorted(set(not_hf.__all__) - {"__version__"}))
def test_every_public_name_has_an_example(name):
    assert ">>> " in getattr(not_hf, name).__doc__


def test_pages_import_top_level_names_only():
    for page in PAGES:
        for block in blocks(page):
            imports = re.findall(r"from not_hf(\S*) import (.+)", block)
            assert all(not module for module, _ in imports), page
            assert {name.strip() for _, names in imports for name in names.split(",")} <= set(not_hf.__all__), page


def test_every_public_name_is_in_the_reference():
    pages = (ROOT / "docs" / "reference").glob("*.md")
    named = re.findall(r"^::: not_hf\.(\w+)$", "\n".join(page.read_text("utf-8") for page in pages), re.MULTILINE)
    assert sorted(named) == sorted(not_hf.__all__)


def test_make_targets_on_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for page in WRITTEN_FOR_PEOPLE:
        for target in re.findall(r"^make ([a-z-]+)", page.read_text("utf-8"), re.MULTILINE):
            assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"{page}: make {target}"


def test_files_on_the_pages_exist():
    for page in WRITTEN_FOR_PEOPLE:
        for path in re.findall(r"`((?:benchmarks|examples|not_hf)/[\w/.]*)`", page.read_text("utf-8")):
            assert (ROOT / path).exists(), f"{page}: {path}"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"], ids=page_id)
def test_lines_are_short(page):
    long = [n for n, line in enumerate(page.read_text("utf-8").splitlines(), 1) if len(line) > 120]
    assert not long, f"{page}: lines {long} are over 120 characters"
