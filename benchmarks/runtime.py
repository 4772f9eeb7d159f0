"""What an organ costs in use: decoding, loading, switching; each paired with what it is held against, in one run.

    python benchmarks/runtime.py            # SmolLM2-135M-Instruct and a random Llama of 1.2 billion parameters
    python benchmarks/runtime.py --quick    # small random models, for the test suite

Decoding: a model with an organ of three layers against the native model that `merge_and_unload` makes of it, turn and
turn about. Loading: `from_pretrained(base, donor)` against `from_pretrained(base)`, each in a process of its own that
has loaded a tiny model and organ before; files are in the page cache. Weights that a load only maps are read before
the peak memory (VmHWM, Linux only) is taken, so it counts them. Switching: a model of 32 layers with organs, against
the same model with LoRA adapters of PEFT.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract import HEADS, ROOT, memory, reset_peak

sys.path[:0] = [str(ROOT / "examples")]

LARGE = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
DEEP = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32}
SMALL = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10}
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description="What an organ costs in use.")
    parser.add_argument("--quick", action="store_true", help="small models, for the test suite")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    parser.add_argument("--load", nargs="+", help=argparse.SUPPRESS)  # one measurement, in a process of its own
    options = parser.parse_args(arguments)
    if options.load:
        print(json.dumps(load_once(*options.load)))
        return {}
    import demo  # the commit, versions and hardware, as in its own results

    repeats = 1 if options.quick else 7
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny = write(folder / "tiny", TINY, "float32")
        if options.quick:
            bases = {"small": write(folder / "small", SMALL, "bfloat16")}
            cases = [("small", "float32")]
        else:
            bases = {
                "SmolLM2-135M": (smollm := demo.unpack_base(folder), write_organ(smollm)),
                "1.2B": write(folder / "large", LARGE, "bfloat16"),
            }
            cases = [
                ("SmolLM2-135M", "float32"),
                ("SmolLM2-135M", "bfloat16"),
                ("1.2B", "bfloat16"),
                ("1.2B", "float32"),
            ]
        first, organ = next(iter(bases.values()))
        found = {
            "decode": decode(first, organ, 8 if options.quick else 64, repeats),
            "load": {f"{name} as {dtype}": load(bases[name], tiny, dtype, repeats) for name, dtype in cases},
            "switch": switch(write(folder / "deep", SMALL if options.quick else DEEP, "float32"), folder, repeats * 5),
            "commit": demo.commit(),
            **demo.provenance(),
        }
    print(tables(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def write(folder: Path, shape: dict[str, int], dtype: str) -> tuple[Path, Path]:
    """A random Llama and an organ of three of its layers, as folders."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **HEADS, tie_word_embeddings=True)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return folder, write_organ(folder)


def write_organ(folder: Path) -> Path:
    """Three layers of a base from its upper half, beside it."""
    from transformers import AutoConfig

    from not_hf import DonorModel

    middle = AutoConfig.from_pretrained(folder).num_hidden_layers // 2
    organ = folder.with_name(f"{folder.name}-organ")
    DonorModel.from_base(folder, (middle, middle + 3) if middle > 2 else (1, 3)).save_pretrained(organ)
    return organ


def turns(ways: dict[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, turn and turn about, after a first turn that does not count."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(repeats + 1):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            if turn:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def paired(ours: list[float], theirs: list[float]) -> float:
    """Median of the ratios of neighbouring turns."""
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


def decode(base: Path, organ: Path, num_tokens: int, repeats: int) -> dict[str, float]:
    """Greedy decoding with a cache, batch 1: transplanted against merged."""
    import torch

    from not_hf import TransplantedForCausalLM

    model = TransplantedForCausalLM.from_pretrained(base, organ)
    merged = copy.deepcopy(model).merge_and_unload()
    ids = torch.arange(5, 37)[None]  # (batch=1, seq=32)
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    ways = {"transplanted": lambda: model.generate(ids, **options), "merged": lambda: merged.generate(ids, **options)}
    assert torch.equal(ways["transplanted"](), ways["merged"]())
    seconds = turns(ways, 2 * repeats)
    speed = {f"{name}_tokens_per_second": num_tokens / statistics.median(times) for name, times in seconds.items()}
    return {**speed, "ratio": paired(seconds["merged"], seconds["transplanted"])}


def load(model: tuple[Path, Path], tiny: tuple[Path, Path], dtype: str, repeats: int) -> dict[str, float]:
    """Seconds and peak memory of both ways, each in fresh processes, turn and turn about."""
    ways: dict[str, list[dict[str, float]]] = {"base": [], "transplanted": []}
    for _ in range(repeats):
        for way, runs in ways.items():
            command = [sys.executable, __file__, "--load", way, dtype, *map(str, (*model, *tiny))]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise RuntimeError(f"loading {way} failed:\n{done.stderr}")
            runs.append(json.loads(done.stdout))
    seconds = {way: [run["seconds"] for run in runs] for way, runs in ways.items()}
    growth = {way: statistics.median(run["memory_growth"] for run in runs) for way, runs in ways.items()}
    size = ways["transplanted"][0]["bytes"]
    return {
        **{f"{way}_seconds": statistics.median(times) for way, times in seconds.items()},
        **{f"{way}_memory_growth": value for way, value in growth.items()},
        "base_bytes": ways["base"][0]["bytes"],
        "bytes": size,
        "time_ratio": paired(seconds["transplanted"], seconds["base"]),
        "memory_ratio": growth["transplanted"] / (growth["base"] + size - ways["base"][0]["bytes"]),
    }


def load_once(way: str, dtype: str, base: str, organ: str, tiny_base: str, tiny_organ: str) -> dict[str, float]:
    """Load a tiny model, then the real one. Sizes in bytes."""
    import torch
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM

    def loaded(base: str, organ: str) -> Any:
        if way == "base":
            return AutoModelForCausalLM.from_pretrained(base, dtype=getattr(torch, dtype))
        return TransplantedForCausalLM.from_pretrained(base, organ, dtype=getattr(torch, dtype))

    loaded(tiny_base, tiny_organ)
    before, start = reset_peak(), time.perf_counter()
    model = loaded(base, organ)
    seconds = time.perf_counter() - start
    for parameter in model.parameters():  # a load maps what it need not convert: have it read
        torch.aminmax(parameter)
    return {
        "seconds": seconds,
        "memory_growth": memory("VmHWM") - before,
        "bytes": sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()),
    }


def switch(model: tuple[Path, Path], scratch: Path, repeats: int) -> dict[str, Any]:
    """Seconds to change what is active, with organs and with PEFT's LoRA adapters, turn and turn about."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM

    base, organ = model
    ours = TransplantedForCausalLM.from_pretrained(base, organ, donor_name="a")
    ours.load_donor(organ, "b", position=2)
    ours.load_donor(organ, "c", position=8)
    ours.set_donor("a")
    lora = LoraConfig(r=16, target_modules="all-linear")
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), lora).save_pretrained(scratch / "lora")
    theirs = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), scratch / "lora", adapter_name="a")
    theirs.load_adapter(scratch / "lora", "b")
    names = {"ours": "a", "theirs": "a"}

    def other(side: str) -> str:
        names[side] = "b" if names[side] == "a" else "a"
        return names[side]

    def disable(context: Callable[[], Any]) -> None:
        with context():
            pass

    def load_and_delete(load: Callable[[], Any], delete: Callable[[], Any]) -> None:
        load()
        delete()

    pointers = {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()}
    seconds = turns(
        {
            "set_donor": lambda: ours.set_donor(other("ours")),
            "set_adapter": lambda: theirs.set_adapter(other("theirs")),
            "set_donor, three": lambda: ours.set_donor(["a", "b", "c"]),
            "disable_donors": lambda: disable(ours.disable_donors),
            "disable_adapter": lambda: disable(theirs.disable_adapter),
            "load_donor": lambda: load_and_delete(
                lambda: ours.load_donor(organ, "new", position=4), lambda: ours.delete_donor("new")
            ),
            "hotswap_donor": lambda: ours.hotswap_donor("a", organ),
            "load_adapter": lambda: load_and_delete(
                lambda: theirs.load_adapter(scratch / "lora", "new"), lambda: theirs.delete_adapter("new")
            ),
        },
        repeats,
    )
    ours.set_donor("a")
    assert {name: tensor.data_ptr() for name, tensor in ours.state_dict().items()} == pointers, "weights were copied"
    medians = {name: statistics.median(times) for name, times in seconds.items()}
    num_layers = ours.base_config.num_hidden_layers
    return {
        "num_layers": num_layers,
        "seconds": medians,
        "ratio": paired(seconds["set_donor"], seconds["set_adapter"]),
    }


def tables(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    speed = found["decode"]
    lines = [
        f"Decoding: {speed['transplanted_tokens_per_second']:.1f} tokens/s transplanted, "
        f"{speed['merged_tokens_per_second']:.1f} merged; ratio {speed['ratio']:.3f}",
        "",
        "| loading | base, s | with organ, s | ratio | weights, MB | peak growth / (that of the base + organ) |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {name} | {each['base_seconds']:.3f} | {each['transplanted_seconds']:.3f} | {each['time_ratio']:.2f} "
        f"| {each['bytes'] / 1e6:,.0f} | {each['memory_ratio']:.3f} |"
        for name, each in found["load"].items()
    ]
    lines += ["", f"| on {found['switch']['num_layers']} layers | ms |", "| --- | ---: |"]
    lines += [f"| `{name}` | {1e3 * seconds:.2f} |" for name, seconds in found["switch"]["seconds"].items()]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
