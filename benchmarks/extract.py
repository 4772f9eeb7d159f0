"""What it costs to cut an organ out of a model on the Hub, against loading the whole model and slicing it.

    python benchmarks/extract.py            # a random bf16 Llama of 24 layers, 6.4 GB in shards (make bench-extract)
    python benchmarks/extract.py --experts  # a Qwen3-MoE of 8 layers with 64 experts each, which are fused when loaded
    python benchmarks/extract.py --quick    # a Llama of 8 small layers

The model lies on a small Hub on this machine (`local_hub/`), which counts the bytes that it serves. Each way runs in a
process of its own with an empty cache, which first does the same with a tiny model, so that neither imports nor their
memory count. Peak memory is the kernel's (VmHWM, Linux only), reset before and read after.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

SHAPES: dict[str, dict[str, Any]] = {
    "full": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 24},
    "experts": {
        **{"model_type": "qwen3_moe", "num_experts": 64, "moe_intermediate_size": 512},
        **{"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8},
    },
    "quick": {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
WAYS = {
    "range": "DonorModel.from_base(Hub ID)",
    "again": "the same once more",
    "folder": "DonorModel.from_base(folder)",
    "whole": "AutoModelForCausalLM.from_pretrained(Hub ID), then from_base(model)",
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every way, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="Cut an organ out of a model on the Hub: bytes, memory, seconds.")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_true", help="a small model, for the test suite")
    which.add_argument("--experts", action="store_true", help="a mixture of experts")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--way", choices=WAYS, help=argparse.SUPPRESS)  # one measurement, in a process of its own
    parser.add_argument("--base", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--layers", nargs=2, type=int, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.way:
        print(json.dumps(measure(options.way, *options.base, tuple(options.layers))))
        return {}
    found = compare("quick" if options.quick else "experts" if options.experts else "full")
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def compare(shape: str) -> dict[str, Any]:
    """Run every way against one Hub and put the numbers side by side."""
    with tempfile.TemporaryDirectory() as scratch, serve(Path(scratch)) as hub:
        import demo  # the commit, versions and hardware, as in its own results
        from huggingface_hub import HfApi

        tiny = {**SHAPES[shape], **SHAPES["tiny"]}  # of the same kind
        folders = {
            name: write_model(Path(scratch, name), each) for name, each in ((shape, SHAPES[shape]), ("tiny", tiny))
        }
        for name, folder in folders.items():
            repo = HfApi().create_repo(f"me/{name}").repo_id
            HfApi().upload_folder(repo_id=repo, folder_path=folder)
        depth = SHAPES[shape]["num_hidden_layers"]
        layers = (depth // 2, depth // 2 + 3)
        ways: dict[str, dict[str, Any]] = {}
        for way in WAYS:
            home = Path(scratch, "home", "range" if way == "again" else way)
            bases = [str(folders[name]) if way == "folder" else f"me/{name}" for name in (shape, "tiny")]
            ways[way] = run(way, bases, layers, home, hub)
        digests = {way: entry.pop("sha256") for way, entry in ways.items()}
        assert len(set(digests.values())) == 1, f"the ways give different organs: {digests}"
        model_bytes = sum(file.stat().st_size for file in folders[shape].glob("*.safetensors"))
        return {"shape": SHAPES[shape], "layers": layers, "model_bytes": model_bytes, "ways": ways} | {
            "commit": demo.commit(),
            **demo.provenance(),
        }


@contextmanager
def serve(scratch: Path) -> Iterator[Any]:
    """Run the test Hub in a folder and set the client's environment, before huggingface_hub is imported."""
    from local_hub import DEFAULT_TOKEN, Hub

    with Hub(scratch / "hub") as hub:
        os.environ.update(
            HF_ENDPOINT=hub.endpoint,
            HF_TOKEN=DEFAULT_TOKEN,
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            NO_PROXY="localhost,127.0.0.1",
        )
        yield hub


def write_model(folder: Path, shape: dict[str, Any]) -> Path:
    """A random model in bf16, in shards of 1 GB as `save_pretrained` writes them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**{"model_type": "llama", "tie_word_embeddings": False, **HEADS, **shape})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    return folder


def run(way: str, bases: list[str], layers: tuple[int, int], home: Path, hub: Any) -> dict[str, Any]:
    """One way in a process of its own, and what the Hub served to it once it was warm."""
    command = [sys.executable, __file__, "--way", way, "--base", *bases, "--layers", *map(str, layers)]
    environment = {**os.environ, "HF_HOME": str(home)}
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        if process.stdout.readline() != "warm\n":
            raise RuntimeError(f"{WAYS[way]} failed with the tiny model")
        hub.requests.clear()
        output, _ = process.communicate("go\n")
    if process.returncode:
        raise RuntimeError(f"{WAYS[way]} failed")
    served = [record for record in hub.requests if record.method == "GET"]
    found = json.loads(output)
    found["requests"] = len(hub.requests)
    found["bytes_served"] = sum(record.bytes for record in served)
    found["bytes_per_organ_byte"] = found["bytes_served"] / found["organ_bytes"]
    found["memory_per_organ_byte"] = found["memory_growth"] / found["organ_bytes"]
    return found


def measure(way: str, base: str, tiny: str, layers: tuple[int, int]) -> dict[str, Any]:
    """Cut once with the tiny model, then once and for all with the real one. Sizes in bytes."""
    from transformers import AutoModelForCausalLM

    from not_hf import DonorModel

    def cut(source: str, layers: tuple[int, int]) -> DonorModel:
        if way == "whole":
            return DonorModel.from_base(AutoModelForCausalLM.from_pretrained(source), layers)
        return DonorModel.from_base(source, layers)

    cut(tiny, (1, 3))
    print("warm", flush=True)
    sys.stdin.readline()
    before, start = reset_peak(), time.perf_counter()
    organ = cut(base, layers)
    seconds, growth = time.perf_counter() - start, memory("VmHWM") - before
    return {
        "seconds": seconds,
        "memory_growth": growth,
        "organ_bytes": sum(parameter.numel() * parameter.element_size() for parameter in organ.parameters()),
        "sha256": digest(organ.state_dict()),
    }


def reset_peak() -> int:
    """Make the kernel forget the peak of this process; returns its resident memory in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return memory("VmRSS")


def memory(key: str) -> int:
    """A line of /proc/self/status in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def digest(tensors: dict[str, Any]) -> str:
    """SHA-256 of tensors, names included."""
    import torch

    total = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        total.update(name.encode())
        total.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    organ = found["ways"]["range"]["organ_bytes"]
    lines = [
        f"Layers {found['layers'][0]} … {found['layers'][1] - 1} ({organ / 1e6:,.1f} MB) "
        f"of a model of {found['model_bytes'] / 1e9:.2f} GB",
        "",
        "| | served, MB | served / organ | peak memory growth / organ | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, entry in found["ways"].items():
        lines.append(
            f"| {WAYS[way]} | {entry['bytes_served'] / 1e6:,.1f} | {entry['bytes_per_organ_byte']:.4f} "
            f"| {entry['memory_per_organ_byte']:.2f} | {entry['seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
