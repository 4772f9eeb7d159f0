"""`DonorTrainer` on two CPU processes (gloo): DDP and FSDP2, by torchrun and by accelerate."""

from __future__ import annotations

import shutil

import pytest

from testing.launching import ON_CPU, TORCHRUN, accelerate, difference, train
from testing.releases import since

MODES = {
    "ddp-torchrun": (TORCHRUN, ["--cpu", "--cache-prefix"]),
    "ddp": (accelerate("ddp.yaml"), ["--cpu"]),
    "fsdp2": ([*accelerate("fsdp2.yaml"), ON_CPU], []),
}


RESUMES_ON_CPU = since("transformers", "5.22", "DDP on the CPU does not resume: it looks for a device cpu:0")


@pytest.fixture(scope="module")
def alone(base_folder, tmp_path_factory):
    """What one process with the same global batch makes, and the organ before the first step."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train([], base_folder("llama"), output, "--cpu", batch_size=4)
    return output


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize(
    "mode", [pytest.param(mode, marks=RESUMES_ON_CPU if mode == "ddp-torchrun" else ()) for mode in MODES]
)
def test_two_processes_make_what_one_does_and_resume(mode, base_folder, alone, tmp_path):
    launcher, options = MODES[mode]
    run = tmp_path / "run"
    train(launcher, base_folder("llama"), run, *options)
    assert difference(run / "organ", alone / "organ") < 1e-4  # losses are summed in another order
    assert difference(run / "organ", run / "checkpoint-2") > 1e-3
    # FSDP ran where it was meant to: only then accelerate writes the whole model beside the organ
    assert (run / "checkpoint-2" / "pytorch_model_fsdp.bin").exists() == (mode == "fsdp2")
    assert not [path for path in run.rglob("*") if "draft" in path.name]

    if mode == "ddp":  # the rest is as under torchrun: only what starts the processes differs
        return
    # stopped after two steps: what a killed run leaves behind
    half = tmp_path / "half"
    half.mkdir()
    shutil.copytree(run / "checkpoint-2", half / "checkpoint-2")
    train(launcher, base_folder("llama"), half, *options, "--resume")
    assert difference(half / "organ", run / "organ") < 1e-6
