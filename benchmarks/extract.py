"""What it costs to cut an organ out of a model on the Hub, and to merge it, against loading the whole model for it.

    python benchmarks/extract.py            # a random bf16 Llama of 24 layers, 6.4 GB in shards (make bench-extract)
    python benchmarks/extract.py --experts  # a Qwen3-MoE of 8 layers with 64 experts each, which are fused when loaded
    python benchmarks/extract.py --quick    # a Llama of 8 small layers; with --experts a small Qwen3-MoE

The model lies on a small Hub on this machine (`local_hub/`), which counts the bytes that it serves. Each way runs in a
process of its own with an empty cache, which first does the same with a tiny model, so that neither imports nor their
memory count. Peak memory is the kernel's (VmHWM, Linux only), reset before and read after.

The organ is then merged: from file to file, and in memory. What is written must be the same, bit for bit, but for two
files that say where the recipient was.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from apart import memory, reset_peak, run_apart

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

SHAPES: dict[str, dict[str, Any]] = {
    "full": {"vocab_size": 128256, "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 24},
    "experts": {
        **{"model_type": "qwen3_moe", "num_experts": 64, "moe_intermediate_size": 512},
        **{"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 8},
    },
    "quick": {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 8},
    "quick-experts": {
        **{"model_type": "qwen3_moe", "num_experts": 8, "moe_intermediate_size": 256},
        **{"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 8},
    },
    "tiny": {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4},
}
HEADS = {"num_attention_heads": 8, "num_key_value_heads": 2}
WAYS = {
    "range": "DonorModel.from_base(Hub ID)",
    "again": "the same once more",
    "folder": "DonorModel.from_base(folder)",
    "whole": "AutoModelForCausalLM.from_pretrained(Hub ID), then from_base(model)",
}
MERGES = {
    "merge-folder": "merge_donor(donor, folder, base folder)",
    "merge-hub": "merge_donor(donor, folder, Hub ID)",
    "merge-memory": "from_pretrained(base folder, donor).merge_and_unload().save_pretrained(folder)",
}
TORCH_ALONE = "import torch; from apart import memory; print(memory('VmRSS'))"
WHENCE = ("README.md", "tokenizer_config.json")  # say whether the recipient was on the Hub


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure every way, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="Cut and merge an organ: bytes, memory, seconds.")
    parser.add_argument("--quick", action="store_true", help="a small model, for the test suite")
    parser.add_argument("--experts", action="store_true", help="a mixture of experts")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    found = compare("-".join(name for name in ("quick", "experts") if getattr(options, name)) or "full")
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
            ways[way] = cut_in_process(way, bases, layers, home, hub)
            if way == "whole":
                shutil.rmtree(home)  # the cached model
        digests = {way: entry.pop("sha256") for way, entry in ways.items()}
        assert len(set(digests.values())) == 1, f"the ways give different organs: {digests}"
        merges = compare_merges(shape, folders, layers, Path(scratch, "home"), hub)
        model_bytes = sum(file.stat().st_size for file in folders[shape].glob("*.safetensors"))
        found = {"shape": SHAPES[shape], "layers": layers, "model_bytes": model_bytes, "ways": ways, "merges": merges}
        return {
            **found,
            "bounds": bounds(folders[shape]),
            "commit": demo.commit(),
            **demo.provenance(__file__),
        }


def compare_merges(
    shape: str, folders: dict[str, Path], layers: tuple[int, int], home: Path, hub: Any
) -> dict[str, dict[str, Any]]:
    """Merge organs of the model and of the tiny one in every way; what is written must be the same."""
    from not_hf import DonorModel

    donors = {name: folder.with_name(f"{name}-organ") for name, folder in folders.items()}
    for name, donor in donors.items():
        DonorModel.from_base(folders[name], layers if name == shape else (1, 3)).save_pretrained(donor)
    names, merges = (shape, "tiny"), dict[str, dict[str, Any]]()
    torch_alone = subprocess.check_output([sys.executable, "-c", TORCH_ALONE], cwd=Path(__file__).parent)
    for way in MERGES:
        bases = [f"me/{name}" if way == "merge-hub" else str(folders[name]) for name in names]
        merges[way] = run(hub, home / way, measure_merge, way, bases, [str(donors[name]) for name in names])
        merges[way]["memory_beyond_torch"] = merges[way].pop("peak") - int(torch_alone)
    files = {way: entry.pop("sha256") for way, entry in merges.items()}
    assert len({json.dumps(each) for each in files.values()}) == 1, f"the ways write different models: {files}"
    return merges


def bounds(folder: Path) -> dict[str, int]:
    """Bytes of the largest tensor, and of the layers' mean."""
    from not_hf.hub.checkpoint import open_checkpoint
    from not_hf.hub.headers import size_of

    sizes = {name: size_of(view) for name, view in open_checkpoint(folder).items()}
    inside = {name: size for name, size in sizes.items() if ".layers." in name}
    depth = len({name.split(".layers.")[1].partition(".")[0] for name in inside})
    return {"largest_tensor": max(sizes.values()), "layer": sum(inside.values()) // depth}


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
    from tokenizers import Tokenizer, models
    from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

    config = AutoConfig.for_model(**{"model_type": "llama", "tie_word_embeddings": False, **HEADS, **shape})
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="1GB")
    PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel())).save_pretrained(folder)
    return folder


def cut_in_process(way: str, bases: list[str], layers: tuple[int, int], home: Path, hub: Any) -> dict[str, Any]:
    """One way of cutting, and what it cost in relation to the organ."""
    found = run(hub, home, measure, way, *bases, layers)
    found["bytes_per_organ_byte"] = found["bytes_served"] / found["organ_bytes"]
    found["memory_per_organ_byte"] = found["memory_growth"] / found["organ_bytes"]
    return found


def run(hub: Any, home: Path, measured: Callable[..., Any], *arguments: Any) -> dict[str, Any]:
    """One way in a process of its own, and what the Hub served to it once it was warm."""
    found = run_apart(measured, *arguments, ready=hub.requests.clear, HF_HOME=str(home))
    found["requests"] = len(hub.requests)
    found["bytes_served"] = sum(record.bytes for record in hub.requests if record.method == "GET")
    return found


def measure(way: str, base: str, tiny: str, layers: tuple[int, int], warm: Callable[[], None]) -> dict[str, Any]:
    """Cut once with the tiny model, then once and for all with the real one. Sizes in bytes."""
    from transformers import AutoModelForCausalLM

    from not_hf import DonorModel

    def cut(source: str, layers: tuple[int, int]) -> DonorModel:
        if way == "whole":
            return DonorModel.from_base(AutoModelForCausalLM.from_pretrained(source), layers)
        return DonorModel.from_base(source, layers)

    cut(tiny, (1, 3))
    warm()
    before, start = reset_peak(), time.perf_counter()
    organ = cut(base, layers)
    seconds, growth = time.perf_counter() - start, memory("VmHWM") - before
    return {
        "seconds": seconds,
        "memory_growth": growth,
        "organ_bytes": sum(parameter.numel() * parameter.element_size() for parameter in organ.parameters()),
        "sha256": digest(organ.state_dict()),
    }


def measure_merge(way: str, bases: list[str], donors: list[str], warm: Callable[[], None]) -> dict[str, Any]:
    """Merge once with the tiny model, then once and for all with the real one. Sizes in bytes."""
    from transformers import AutoTokenizer

    from not_hf import TransplantedForCausalLM, merge_donor

    def merge(base: str, donor: str, folder: str) -> str | None:
        if way != "merge-memory":
            return merge_donor(donor, folder, base, max_shard_size="1GB").built_because
        model = TransplantedForCausalLM.from_pretrained(base, donor)
        model.merge_and_unload().save_pretrained(folder, max_shard_size="1GB")
        AutoTokenizer.from_pretrained(base).save_pretrained(folder)
        return None

    with tempfile.TemporaryDirectory() as scratch:
        merge(bases[1], donors[1], f"{scratch}/tiny")
        warm()
        before, start = reset_peak(), time.perf_counter()
        built_because = merge(bases[0], donors[0], f"{scratch}/merged")
        seconds, peak = time.perf_counter() - start, memory("VmHWM")
        written = sorted(file for file in Path(scratch, "merged").iterdir() if file.name not in WHENCE)
        return {
            "seconds": seconds,
            "memory_growth": peak - before,
            "peak": peak,
            "built_because": built_because,
            "merged_bytes": sum(file.stat().st_size for file in written if file.suffix == ".safetensors"),
            "sha256": {file.name: file_digest(file) for file in written},
        }


def file_digest(file: Path) -> str:
    """SHA-256 of a file."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


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
    merged = next(iter(found["merges"].values()))["merged_bytes"]
    lines += [
        "",
        f"Merged: {merged / 1e9:.2f} GB; the largest tensor has {found['bounds']['largest_tensor'] / 1e6:,.1f} MB, "
        f"a layer {found['bounds']['layer'] / 1e6:,.1f} MB; the files are the same, bit for bit",
        "",
        "| | served, MB | peak memory growth, MB | peak beyond `import torch`, MB | seconds |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for way, entry in found["merges"].items():
        built = f" (built: {entry['built_because']})" if entry["built_because"] else ""
        lines.append(
            f"| {MERGES[way]}{built} | {entry['bytes_served'] / 1e6:,.1f} | {entry['memory_growth'] / 1e6:,.1f} "
            f"| {entry['memory_beyond_torch'] / 1e6:,.1f} | {entry['seconds']:.1f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
