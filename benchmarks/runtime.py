"""What an organ costs in use: decoding, loading, memory, switching, each paired with what it is compared to.

    python benchmarks/runtime.py            # make bench-runtime: SmolLM2-135M, two random Llamas
    python benchmarks/runtime.py --quick    # a small random model, for the test suite

Decoding: a model with an organ of three layers against the native model that `merge_and_unload` makes of it.
Loading: until the first forward pass (1 x 8 tokens) is done, against that native model as `save_pretrained` wrote it;
and what the organ adds to a load of the base, less the time to read the donor's file and look at each value once
(converted, where the load converts). All in one process, in alternating order; files are in the page cache. A process
keeps its last twins (models without weights, for the compatibility check), so loads are timed with twins kept and
with none, as in the first load of a process.
Memory: the peak of one load (VmHWM, Linux only) and one look at every weight, each in a process of its own that has
loaded a tiny model and organ before.
Switching: a model of 32 layers with organs, against the same model with LoRA adapters of PEFT.
At the end: which targets hold.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract import HEADS, ROOT
from loading import TWINS, Folders, load, load_memory, paired

sys.path[:0] = [str(ROOT / "examples")]

LARGE = {"vocab_size": 32768, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 24}
MIDDLE = {"vocab_size": 4096, "hidden_size": 1024, "intermediate_size": 1408, "num_hidden_layers": 32}
DEEP = {"vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 32}
SMALL = {"vocab_size": 2048, "hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 10}
TINY = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the tables, write the numbers."""
    parser = argparse.ArgumentParser(description="What an organ costs in use.")
    parser.add_argument("--quick", action="store_true", help="small models, for the test suite")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    import demo  # the commit, versions and hardware, as in its own results
    import transformers

    transformers.logging.disable_progress_bar()
    repeats, switches = (1, 3) if options.quick else (7, 35)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        tiny = write(folder / "tiny", TINY, "float32")
        if options.quick:
            bases = {"small": write(folder / "small", SMALL, "bfloat16")}
            cases = [("small", "float32")]
        else:
            bases = {
                "SmolLM2-135M": write_organ(demo.unpack_base(folder)),
                "0.2B, 32 layers": write(folder / "middle", MIDDLE, "float32"),
                "1.2B": write(folder / "large", LARGE, "bfloat16"),
            }
            cases = [
                ("SmolLM2-135M", "float32"),
                ("SmolLM2-135M", "bfloat16"),
                ("0.2B, 32 layers", "float32"),
                ("1.2B", "bfloat16"),
                ("1.2B", "float32"),
            ]
        found = {
            "decode": decode(next(iter(bases.values())), 8 if options.quick else 64, repeats),
            "load": {
                f"{name} as {dtype}": {
                    **load(bases[name], dtype, repeats),
                    **load_memory(bases[name], tiny, dtype, repeats),
                }
                for name, dtype in cases
            },
            "switch": switch(write(folder / "deep", SMALL if options.quick else DEEP, "float32"), folder, switches),
            "commit": demo.commit(),
            **demo.provenance(__file__),
        }
    found["targets"] = targets(found)
    print(tables(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def write(folder: Path, shape: dict[str, int], dtype: str) -> Folders:
    """A random Llama, with an organ of three of its layers."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, **HEADS, tie_word_embeddings=True)).to(getattr(torch, dtype))
    model.save_pretrained(folder)
    return write_organ(folder)


def write_organ(base: Path) -> Folders:
    """Three layers of a base from its upper half, beside it, and the base with them."""
    from transformers import AutoConfig

    from not_hf import DonorModel, TransplantedForCausalLM

    middle = AutoConfig.from_pretrained(base).num_hidden_layers // 2
    organ, native = (base.with_name(f"{base.name}-{kind}") for kind in ("organ", "native"))
    DonorModel.from_base(base, (middle, middle + 3) if middle > 2 else (1, 3)).save_pretrained(organ)
    TransplantedForCausalLM.from_pretrained(base, organ).merge_and_unload().save_pretrained(native)
    return Folders(base, organ, native)


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


def decode(folders: Folders, num_tokens: int, repeats: int) -> dict[str, float]:
    """Greedy decoding with a cache, batch 1: transplanted against merged."""
    import torch

    from not_hf import TransplantedForCausalLM

    model = TransplantedForCausalLM.from_pretrained(folders.base, folders.organ)
    merged = copy.deepcopy(model).merge_and_unload()
    ids = torch.arange(5, 37)[None]  # (batch=1, seq=32)
    options = {"max_new_tokens": num_tokens, "min_new_tokens": num_tokens, "do_sample": False, "pad_token_id": 0}
    options["attention_mask"] = torch.ones_like(ids)
    ways = {"transplanted": lambda: model.generate(ids, **options), "merged": lambda: merged.generate(ids, **options)}
    assert torch.equal(ways["transplanted"](), ways["merged"]())
    seconds = turns(ways, 2 * repeats)
    speed = {f"{name}_tokens_per_second": num_tokens / statistics.median(times) for name, times in seconds.items()}
    return {**speed, "ratio": paired(seconds["merged"], seconds["transplanted"])}


def switch(model: Folders, scratch: Path, repeats: int) -> dict[str, Any]:
    """Seconds to change what is active, with organs and with PEFT's LoRA adapters, turn and turn about."""
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import AutoModelForCausalLM

    from not_hf import TransplantedForCausalLM

    base, organ, _ = model
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


def targets(found: dict[str, Any]) -> list[dict[str, Any]]:
    """What was asked for and what was found, of several cases the worst one."""
    loads, switches = found["load"], found["switch"]["seconds"]

    def worst(key: str) -> tuple[str, float]:
        name = max(loads, key=lambda name: loads[name][key])
        return name, loads[name][key]

    slowest = max(("set_donor", "set_donor, three", "disable_donors"), key=lambda name: switches[name])
    rows: list[tuple[str, str, float, str, float]] = [
        ("decoding speed / native", next(iter(loads)).split()[0], found["decode"]["ratio"], ">=", 0.99),
        *((f"load and first forward / native, {each}", *worst(f"per_native, {each}"), "<=", 1.05) for each in TWINS),
        *((f"organ in a load less its bytes, ms, {each}", *worst(f"organ_ms, {each}"), "<=", 25.0) for each in TWINS),
        ("load memory / (base + organ)", *worst("memory_ratio"), "<=", 1.05),
        ("switch, ms", slowest, 1e3 * switches[slowest], "<=", 5.0),
    ]
    return [
        {
            **{"what": what, "case": case, "found": value, "target": f"{sign} {bound:.2f}"},
            "holds": value >= bound if sign == ">=" else value <= bound,
        }
        for what, case, value, sign, bound in rows
    ]


def tables(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    speed = found["decode"]
    lines = [
        f"Decoding: {speed['transplanted_tokens_per_second']:.1f} tokens/s transplanted, "
        f"{speed['merged_tokens_per_second']:.1f} merged; ratio {speed['ratio']:.3f}",
        "",
        "| loading | native: until the first forward is done, s | with organ, s | / native "
        "| base: load alone, s | with organ, s | organ's file read, ms | organ adds beside, ms |",
        f"| --- |{' ---: |' * 7}",
    ]
    for name, each in found["load"].items():
        for twins in TWINS:
            whole, alone = (
                f"{each[f'{key}, {other}']:.3f} | {each[f'{key}, {twins}']:.3f}"
                for key, other in (("forward_seconds", "native"), ("load_seconds", "base"))
            )
            lines.append(
                f"| {name}, {twins} | {whole} | {each[f'per_native, {twins}']:.2f} "
                f"| {alone} | {1e3 * each['load_seconds, read']:.0f} | {each[f'organ_ms, {twins}']:.0f} |"
            )
    lines += ["", "| memory | weights, MB | peak growth / (that of the base + organ) |", "| --- | ---: | ---: |"]
    for name, each in found["load"].items():
        lines.append(f"| {name} | {each['transplanted_bytes'] / 1e6:,.0f} | {each['memory_ratio']:.3f} |")
    lines += ["", f"| on {found['switch']['num_layers']} layers | ms |", "| --- | ---: |"]
    lines += [f"| `{name}` | {1e3 * seconds:.2f} |" for name, seconds in found["switch"]["seconds"].items()]
    lines += ["", "| target | | found, at worst | holds |", "| --- | ---: | ---: | --- |"]
    for each in found["targets"]:
        holds = "yes" if each["holds"] else "no"
        lines.append(f"| {each['what']} | {each['target']} | {each['found']:.3f} ({each['case']}) | {holds} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
