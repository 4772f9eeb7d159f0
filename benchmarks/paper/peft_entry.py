"""Entries in the form of PEFT's `method_comparison`, made of runs of `train.py`.

    python benchmarks/paper/peft_entry.py --runs benchmarks/results/train.json --output FOLDER [--base FOLDER]

PEFT holds its methods against each other in `method_comparison/MetaMathQA`, with a JSON file for each run. The fields
here are those of its files of July 2026, `forgetting` included: the loss on a general text after training less that
before. What cannot be filled is null:

- `query_template`, `generation_kwargs`, `test accuracy`: the runs learn plain text, and nothing is asked of them. The
  loss on held-out text stands beside it as `test loss`, which PEFT's files do not have.
- `eval_steps`, `accelerator_memory_reserved_*`: nothing is measured on the way; `metrics` has the last entry only.
- `accelerator_memory_max` is the growth of the process's memory, for there was no accelerator.
- `created_at`, `total_time`, `peft_branch`, commits of packages, `pytorch_info`, and the versions of PEFT and
  bitsandbytes: not recorded by `train.py`. `train_time` is processor seconds of one thread.
- `model_info`, `dataset_info`: base and texts come out of Python packages, not from the Hub.
- `num_total_params`, unless `--base` is the folder of the model, whose config says it.

`train loss` is the mean of the last quarter of the steps. `lr_scheduler` is "linear", which PEFT's own script does not
have. These entries stand beside each other in the form of PEFT's table; beside those of MetaMathQA with Llama-3.2-3B
they would need that model and its task.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1])]
from methods import METHODS, mean  # noqa: E402 (from the folder above)

MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"


def main(arguments: list[str] | None = None) -> list[Path]:
    """Write a file for each run that was tested."""
    parser = argparse.ArgumentParser(description="Runs of train.py in the form of PEFT's method_comparison.")
    parser.add_argument("--runs", type=Path, required=True, help="JSON file that train.py has written")
    parser.add_argument("--output", type=Path, required=True, help="folder of the entries")
    parser.add_argument("--base", type=Path, help="folder of the model, to count its parameters")
    options = parser.parse_args(arguments)
    total = num_parameters(options.base) if options.base else None
    options.output.mkdir(parents=True, exist_ok=True)
    written = []
    for entry in entries(json.loads(options.runs.read_text("utf-8")), total):
        name = entry["run_info"]["experiment_name"].replace("/", "--")
        written.append(options.output / f"{name}.json")
        written[-1].write_text(json.dumps(entry, indent=2) + "\n", encoding="utf-8")
    return written


def num_parameters(base: Path) -> int:
    """Parameters of a model, by its config alone."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(base)).num_parameters()


def entries(document: dict[str, Any], total: int | None) -> list[dict[str, Any]]:
    """The entry of each run of a file of `train.py` that was tested; the base has `total` parameters."""
    runs = document["runs"]
    before = {run["given"]["domain"]: run["held"]["test"]["0"] for run in runs if run["given"]["method"] is None}
    tested = [run for run in runs if run["given"]["method"] and "1" in run["held"].get("test", {})]
    return [entry(run, before[run["given"]["domain"]], total, document) for run in tested]


def entry(
    run: dict[str, Any], before: dict[str, list[float]], total: int | None, document: dict[str, Any]
) -> dict[str, Any]:
    """The entry of a run; `before` are the losses of the base."""
    given, losses = run["given"], run["held"]["test"]["1"]
    kind, name = kind_of(given["method"])
    samples = given["steps"] * given["batch"]
    added = run["trained"] if kind == "lora" else 0
    metrics = {
        "step": given["steps"],
        "test accuracy": None,
        "train loss": mean(run["losses"][-len(run["losses"]) // 4 :]),
        "train samples": samples,
        "train total tokens": samples * given["block"],
        "forgetting": mean(losses["control"]) - mean(before["control"]),
        "test loss": mean(losses["domain"]),
    }
    return {
        "run_info": {
            "created_at": None,
            "total_time": None,
            "experiment_name": f"{kind}/SmolLM2-135M-{name}-{given['domain']}-seed{given['seed']}",
            "peft_branch": None,
            "train_config": train_config(given),
            "peft_config": peft_config(given["method"]),
            "error_msg": "",
        },
        "train_info": {
            "accelerator_memory_reserved_avg": None,
            "accelerator_memory_max": run["peak"],
            "accelerator_memory_reserved_99th": None,
            "train_time": run["ends"][-1],
            "file_size": run["file_bytes"],
            "num_trainable_params": run["trained"],
            "num_total_params": total and total + added,
            "status": "success",
            "metrics": [metrics],
        },
        "meta_info": {
            "model_info": {"sha": None, "created_at": None},
            "dataset_info": {name: {"sha": None, "created_at": None} for name in (given["domain"], "english")},
            "package_info": package_info(document["versions"]),
            "system_info": {
                "system": document["hardware"]["machine"].partition("-")[0],
                "release": None,
                "version": None,
                "machine": document["hardware"]["machine"],
                "processor": document["hardware"]["processor"],
                "accelerator": None,
            },
            "pytorch_info": None,
        },
    }


def kind_of(method: str) -> tuple[str, str]:
    """The name of a method as PEFT's folders have it, and what distinguishes its setting from others."""
    kind, _, rest = method.partition(", ")
    kinds = {"organ": "organ", "full": "full-finetuning"}
    return kinds.get(kind, "lora"), "-".join(
        (f"{'' if kind in kinds else kind} {rest}").replace("=", " ").split()
    ) or "all"


def train_config(given: dict[str, Any]) -> dict[str, Any]:
    """How a run was trained, by `methods.fit`."""
    return {
        "model_id": MODEL,
        "dtype": "float32",
        "max_seq_length": given["block"],
        "batch_size": given["batch"],
        "batch_size_eval": 4,
        "max_steps": given["steps"],
        "eval_steps": None,
        "compile": False,
        "use_gc": given.get("gradient_checkpointing", False),
        "query_template": None,
        "seed": given["seed"],
        "grad_norm_clip": 1.0,
        "optimizer_type": "AdamW",
        "optimizer_kwargs": {"lr": given["rate"], "weight_decay": 0.0},
        "lr_scheduler": "linear",
        "use_amp": False,
        "autocast_adapter_dtype": True,
        "generation_kwargs": None,
        "attn_implementation": None,
        "init_kv_cache_prefix": None,
    }


def peft_config(name: str) -> dict[str, Any] | None:
    """What a method trains; of full fine-tuning `None`, as in PEFT's files."""
    method = METHODS[name]
    if method.lora is not None:
        return {"peft_type": "LORA", "base_model_name_or_path": MODEL, "target_modules": "all-linear", **method.lora}
    if method.donor_trainer:
        place = {"span": list(method.span), "mode": "insert" if method.inserted else "replace"}
        return {"peft_type": "ORGAN", "base_model_name_or_path": MODEL, "modules": method.modules, **place}
    return None


def package_info(versions: dict[str, str]) -> dict[str, str | None]:
    """Versions, as far as they were recorded; no commit was."""
    names = ("transformers", "peft", "datasets", "bitsandbytes", "torch")
    return {
        key: value
        for name in names
        for key, value in ((f"{name}-version", versions.get(name)), (f"{name}-commit-hash", None))
    }


if __name__ == "__main__":
    for path in main():
        print(path)
