"""Every operation of an organ's life, over architectures × set-ups, by the common tester."""

from __future__ import annotations

import inspect

import pytest
import torch

from testing.lifecycle import PARTS, SETUPS, Tester
from testing.models import TOKEN_IDS
from testing.processes import run_python
from testing.shapes import ARCHITECTURES, ENCODERS, OTHERS, PLAIN, STATEFUL, exhaustive, in_matrix

EVERY = (*ARCHITECTURES, *ENCODERS)
FEW = ("gpt2", "llama", "qwen3_moe", "gemma3_text", "modernbert")  # with organs that stand alone as well
IN_PLACE = (
    "diffllama",
    "gemma3n_text",
)  # what layers compute depends on their number, or they have inputs of their own
IN_PARTS = in_matrix(
    *("bert", "falcon", "gemma3_text", "gpt2", "gpt_neox", "gpt_oss", "llama", "mamba2", "mixtral", "olmo2", "opt"),
    *("phi3", "qwen3_moe", "qwen3_next"),
)
CHECKS = [name for name in vars(Tester) if name.startswith("check_")]
CACHED = ("check_generating", "check_continuing")
FEWER = ("check_disabling", "check_merging", "check_saving", "check_continuing")
EVERYDAY = ("check_merging", "check_saving")  # of every architecture
OF_PARTS = {
    "outputs": [check for check in CHECKS if check != "check_generating"],
    **dict.fromkeys(("attention", "mlp"), ("check_merging", "check_saving")),
}


def setups(model_type: str) -> list[str]:
    """The set-ups in which an architecture is tried."""
    parts = [part for part in PARTS if model_type in IN_PARTS and (model_type, part) != ("mamba2", "mlp")]
    if model_type in FEW:
        return ["insert", "replace", "several", *parts]
    if model_type in IN_PLACE:
        return ["replace"]
    return ["two" if model_type in {*STATEFUL, *PLAIN, *OTHERS} - {"qwen3_next"} else "several", *parts]


def marks(model_type: str, setup: str, check: str) -> list[pytest.MarkDecorator]:
    """`make test-fast` tries several organs at a time, and parts of layers with one architecture."""
    found = [pytest.mark.xdist_group(model_type)]
    if setup != "several" and (setup not in PARTS or model_type != "llama"):
        found.append(pytest.mark.slow)
    if check not in EVERYDAY:
        found.extend(exhaustive(model_type))
    return found


LIVES = [
    pytest.param(model_type, setup, check, marks=marks(model_type, setup, check))
    for model_type in (*EVERY, *OTHERS)
    for setup in setups(model_type)
    for check in (FEWER if model_type in OTHERS else OF_PARTS.get(setup, CHECKS))
    if not (model_type in ENCODERS and check in CACHED)
]


@pytest.mark.parametrize(("model_type", "setup", "check"), LIVES)
def test_life_of_organs(model_type, setup, check, tmp_path):
    run = getattr(Tester(model_type, (SETUPS | PARTS)[setup]), check)
    run(tmp_path) if "folder" in inspect.signature(run).parameters else run()


# Run by a process that cannot import not_hf: the logits of every model in a folder.
_WITHOUT_NOT_HF = """
import sys, torch
sys.modules["not_hf"] = None  # importing it raises
from pathlib import Path
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM
torch.set_num_threads(1)
root = Path(sys.argv[1])
ids = torch.load(root / "ids.pt")
found = {}
for folder in root.glob("*/*"):
    load = AutoModelForMaskedLM if folder.parent.name == "encoders" else AutoModelForCausalLM
    model, info = load.from_pretrained(folder, output_loading_info=True)
    for parameter in model.requires_grad_(False).parameters():
        parameter.data = parameter.data.clone()  # else where a file has put it in memory decides how torch rounds
    assert not info["missing_keys"] and not info["unexpected_keys"], (folder, info)
    with torch.no_grad():
        found[folder.name] = model(ids).logits
torch.save(found, root / "found.pt")
"""


@pytest.mark.slow
def test_merged_models_load_without_not_hf(tmp_path):
    types = in_matrix("bert", "gemma3_text", "gpt2", "gpt_oss", "llama", "mixtral", "modernbert", "qwen3_next")
    testers = {model_type: Tester(model_type, SETUPS["several"]) for model_type in types}
    for model_type, tester in testers.items():
        folder = tmp_path / ("encoders" if model_type in ENCODERS else "decoders") / model_type
        tester.fresh().merge_and_unload().save_pretrained(folder)
    torch.save(TOKEN_IDS, tmp_path / "ids.pt")
    done = run_python("-c", _WITHOUT_NOT_HF, tmp_path)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    wrong = [each for each, tester in testers.items() if not torch.equal(found[each], tester.expected(tester.places))]
    assert found.keys() == testers.keys() and not wrong
