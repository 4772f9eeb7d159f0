"""Entries in the form of PEFT's method comparison have the fields that its own files have."""

from __future__ import annotations

import importlib
import json
import math

import pytest
from transformers import AutoModelForCausalLM

from testing import ROOT

# of method_comparison/MetaMathQA/results/unilora--llama-3.2-3B-default.json in huggingface/peft, commit 095a3f96
FIELDS = {
    "run_info": {
        "created_at", "total_time", "experiment_name", "peft_branch", "train_config", "peft_config", "error_msg",
    },
    "run_info.train_config": {
        "model_id", "dtype", "max_seq_length", "batch_size", "batch_size_eval", "max_steps", "eval_steps", "compile",
        "use_gc", "query_template", "seed", "grad_norm_clip", "optimizer_type", "optimizer_kwargs", "lr_scheduler",
        "use_amp", "autocast_adapter_dtype", "generation_kwargs", "attn_implementation", "init_kv_cache_prefix",
    },
    "train_info": {
        "accelerator_memory_reserved_avg", "accelerator_memory_max", "accelerator_memory_reserved_99th", "train_time",
        "file_size", "num_trainable_params", "num_total_params", "status", "metrics",
    },
    "meta_info": {"model_info", "dataset_info", "package_info", "system_info", "pytorch_info"},
    "meta_info.model_info": {"sha", "created_at"},
    "meta_info.package_info": {
        f"{name}-{what}"
        for name in ("transformers", "peft", "datasets", "bitsandbytes", "torch")
        for what in ("version", "commit-hash")
    },
    "meta_info.system_info": {"system", "release", "version", "machine", "processor", "accelerator"},
}  # fmt: skip
LAST_METRICS = {"step", "test accuracy", "train loss", "train samples", "train total tokens", "forgetting"}
OUR_OWN = {"test loss"}
RUNS = ROOT / "benchmarks" / "results" / "train.json"


@pytest.fixture
def peft_entry(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks" / "paper")
    return importlib.import_module("peft_entry")


@pytest.fixture
def entries(peft_entry, tmp_path):
    paths = peft_entry.main(["--runs", str(RUNS), "--output", str(tmp_path)])
    return [json.loads(path.read_text("utf-8")) for path in paths]


def test_the_fields_are_those_of_pefts_files(entries):
    assert entries
    for entry in entries:
        assert set(entry) == {"run_info", "train_info", "meta_info"}
        for path, names in FIELDS.items():
            part = entry
            for name in path.split("."):
                part = part[name]
            assert set(part) == names, path
        assert set(entry["train_info"]["metrics"][-1]) == LAST_METRICS | OUR_OWN
        assert all(set(each) == {"sha", "created_at"} for each in entry["meta_info"]["dataset_info"].values())


def test_the_numbers_are_those_of_the_runs(entries):
    runs = json.loads(RUNS.read_text("utf-8"))["runs"]
    base = next(run for run in runs if (run["given"]["method"], run["given"]["domain"]) == (None, "kjv"))
    mine = {"method": "organ, outputs", "domain": "kjv", "seed": 0}
    run = next(run for run in runs if mine.items() <= run["given"].items())
    (entry,) = (
        each for each in entries if each["run_info"]["experiment_name"] == "organ/SmolLM2-135M-outputs-kjv-seed0"
    )
    assert entry["run_info"]["train_config"]["optimizer_kwargs"] == {"lr": run["given"]["rate"], "weight_decay": 0.0}
    assert entry["run_info"]["peft_config"]["modules"] == "outputs"
    train, metrics = entry["train_info"], entry["train_info"]["metrics"][-1]
    assert (train["num_trainable_params"], train["file_size"]) == (run["trained"], run["file_bytes"])
    assert metrics["train total tokens"] == 128 * metrics["train samples"] == 128 * 2 * run["given"]["steps"]
    control = [sum(each["held"]["test"][key]["control"]) / 64 for each, key in ((base, "0"), (run, "1"))]
    assert math.isclose(metrics["forgetting"], control[1] - control[0], rel_tol=1e-9)


def test_a_base_gives_the_number_of_all_parameters(peft_entry, base_folder):
    folder = base_folder("llama")
    assert peft_entry.num_parameters(folder) == AutoModelForCausalLM.from_pretrained(folder).num_parameters()
