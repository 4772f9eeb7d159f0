"""`DonorTrainer` on two CPU processes (gloo): DDP and FSDP2, by torchrun and by accelerate."""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from transformers import Trainer

from not_hf import DonorTrainer, TransplantedForCausalLM
from testing.donors import same
from testing.launching import ON_CPU, TORCHRUN, accelerate, difference, train
from testing.models import tiny_model
from testing.processes import forked
from testing.releases import since
from testing.training import made, organ, rows, two_organs

MODES = {
    "ddp-torchrun": (TORCHRUN, ["--cpu", "--cache-prefix"]),
    "ddp": (accelerate("ddp.yaml"), ["--cpu"]),
    "fsdp2": ([*accelerate("fsdp2.yaml"), ON_CPU], []),
}


RESUMES_ON_CPU = since("transformers", "5.22", "DDP on the CPU does not resume: it looks for a device cpu:0")

MARKS = {"ddp-torchrun": [RESUMES_ON_CPU, pytest.mark.exhaustive], "fsdp2": [pytest.mark.exhaustive]}


@pytest.fixture(scope="module")
def alone(base_folder, tmp_path_factory):
    """What one process with the same global batch makes, and the organ before the first step."""
    output = tmp_path_factory.mktemp("alone") / "run"
    train([], base_folder("llama"), output, "--cpu", batch_size=4)
    return output


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("mode", [pytest.param(mode, marks=MARKS.get(mode, ())) for mode in MODES])
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


def train_two_organs(cls: type[Trainer], folder: Path, batch_size: int) -> None:
    """Train, resume in the middle in another folder, and keep the organs that came back at the end."""
    options = {"max_steps": 4, "save_steps": 2, "eval_steps": 2, "save_strategy": "steps", "eval_strategy": "steps"}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "greater_is_better": True}
    options |= {"per_device_train_batch_size": batch_size, "cls": cls, "eval_dataset": rows(4)}
    for run, checkpoint in (("whole", None), ("resumed", str(folder / "whole/run/checkpoint-2"))):
        trainer = made(two_organs(), folder / run, rows(8), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        torch.save(organ(trainer.model), folder / f"{run}-{os.environ.get('RANK', 0)}")


def as_rank(rank: int, port: int, cls: type[Trainer], folder: Path) -> None:
    """What one of two processes does."""
    AcceleratorState._reset_state(reset_partial_state=True)
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ.update(ranks, MASTER_ADDR="localhost", MASTER_PORT=str(port))
    train_two_organs(cls, folder, batch_size=2)
    torch.distributed.destroy_process_group()


@RESUMES_ON_CPU
@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
@pytest.mark.parametrize("cls", [DonorTrainer, Trainer])
def test_two_organs_on_two_processes(cls, tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [forked(as_rank, rank, port, cls, tmp_path / "two") for rank in (0, 1)]
    for process in processes:
        process.join(120)
        process.kill()  # one that waits for the other
    assert [process.exitcode for process in processes] == [0, 0]
    train_two_organs(cls, tmp_path / "one", batch_size=4)
    runs = [tmp_path / "two/whole/run", tmp_path / "two/resumed/run", tmp_path / "one/whole/run"]
    whole, resumed, alone = (load_file(run / "checkpoint-4/model.safetensors") for run in runs)
    assert same(whole, resumed)
    assert all((tensor - alone[name]).abs().max() < 1e-4 for name, tensor in whole.items())
    best = TransplantedForCausalLM.from_pretrained(tiny_model("llama"), runs[0] / "checkpoint-2", is_trainable=True)
    kept = [torch.load(tmp_path / f"two/{run}-{rank}") for run in ("whole", "resumed") for rank in (0, 1)]
    assert all(same(organ(best), each) for each in kept)  # the loss falls, and the greatest was asked for


def push_sharded(rank: int, port: int, folder: Path) -> None:
    """What one of two processes does."""
    torch.distributed.init_process_group("gloo", f"tcp://localhost:{port}", rank=rank, world_size=2)
    model = two_organs()
    for layer in model.model.layers:
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    model.save_pretrained(folder, push_to_hub=True, repo_id="me/sharded", is_main_process=rank == 0)
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.xdist_group("distributed")
def test_sharded_organs_are_gathered_by_all_processes_and_pushed_by_one(hub, tmp_path):
    with socket.create_server(("localhost", 0)) as server:
        port = server.getsockname()[1]
    processes = [forked(push_sharded, rank, port, tmp_path / "saved") for rank in (0, 1)]
    for process in processes:
        process.join(60)
        process.kill()  # one that waits for the other
    assert [process.exitcode for process in processes] == [0, 0]
    two_organs().save_pretrained(tmp_path / "alone")
    saved, alone, pushed = (
        organ(TransplantedForCausalLM.from_pretrained(tiny_model("llama"), place))
        for place in (tmp_path / "saved", tmp_path / "alone", "me/sharded")
    )
    assert same(saved, alone) and same(pushed, alone)
    assert len([record for record in hub.requests if "me/sharded/commit/" in record.path]) == 1
