"""Time to the first token after another organ is chosen, on a prompt that was read before.

    python benchmarks/prefill.py            # SmolLM2-135M-Instruct, 2,048 tokens (make bench-prefill)
    python benchmarks/prefill.py --quick    # a small random model, for the test suite

Two organs replace the last layers of a model, from layer e on. After each switch, one token is generated: with the
whole prompt read again, and from `prefill()`. Beside it PEFT switches LoRA adapters on all linear layers, after which
the prompt must be read again. All in one process, in alternating order; medians, and the median of paired ratios.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from not_hf import DonorModel, TransplantedForCausalLM

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base; commit, versions and hardware)

SMALL = {"vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 12}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 4}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="Time to the first token after a switch.")
    parser.add_argument("--quick", action="store_true", help="a small model, for the test suite")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    given = parser.parse_args(arguments)
    num_tokens, repeats = (256, 3) if given.quick else (2048, 5)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as scratch:
        if given.quick:
            base = str(Path(scratch, "base"))
            LlamaForCausalLM(LlamaConfig(**SMALL, **HEADS)).save_pretrained(base)
        else:
            base = str(demo.unpack_base(given.cache))
        num_layers = AutoModelForCausalLM.from_pretrained(base).config.num_hidden_layers
        ids = torch.randint(5, 2000, (1, num_tokens))  # (batch=1, seq)
        cases = [switch(base, entry, ids, repeats) for entry in (num_layers // 2, 5 * num_layers // 6)]
        adapters = lora(base, Path(scratch, "lora"), ids, repeats)
    found = {"num_tokens": num_tokens, "num_layers": num_layers, "cases": cases, "lora_seconds": adapters}
    found |= {"commit": demo.commit(), **demo.provenance(__file__)}
    print(table(found))
    if given.output:
        given.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def switch(base: str, entry: int, ids: torch.Tensor, repeats: int) -> dict[str, float]:
    """Seconds to the first token after a switch between two organs from layer `entry` on."""
    model: Any = TransplantedForCausalLM.from_pretrained(base, organ(base, entry, 1), donor_name="a")
    model.set_donor([])
    model.load_donor(organ(base, entry, 2), "b")
    names = itertools.cycle("ab")
    prefill = model.prefill(ids)
    seconds: dict[str, list[float]] = {"whole": [], "shared": []}
    for turn in range(repeats + 1):
        name = next(names)
        tokens = []
        for way, options in (("whole", {}), ("shared", {"prefill": prefill})):
            model.set_donor([])
            start = time.perf_counter()
            model.set_donor(name)
            tokens.append(first_token(model, ids, **options))
            if turn:
                seconds[way].append(time.perf_counter() - start)
        assert torch.equal(*tokens)
    ratio = statistics.median(map(float.__truediv__, seconds["shared"], seconds["whole"]))
    layers = model.base_config.num_hidden_layers
    medians = {f"{way}_seconds": statistics.median(times) for way, times in seconds.items()}
    return {"entry": entry, **medians, "ratio": ratio, "share_of_layers": (layers - entry) / layers}


def organ(base: str, entry: int, seed: int) -> DonorModel:
    """Layers from `entry` to the last, every tensor moved a little."""
    num_layers = AutoModelForCausalLM.from_pretrained(base).config.num_hidden_layers
    donor = DonorModel.from_base(base, (entry, num_layers), mode="replace")
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in donor.parameters():
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=generator))
    return donor


def lora(base: str, folder: Path, ids: torch.Tensor, repeats: int) -> float:
    """Median seconds to the first token after PEFT's `set_adapter`."""
    get_peft_model(
        AutoModelForCausalLM.from_pretrained(base), LoraConfig(r=16, target_modules="all-linear")
    ).save_pretrained(folder)
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder, adapter_name="a")
    model.load_adapter(folder, "b")
    seconds: list[float] = []
    for turn, name in zip(range(repeats + 1), itertools.cycle("ba")):
        start = time.perf_counter()
        model.set_adapter(name)
        first_token(model, ids)
        if turn:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def first_token(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """The sequence with one more token, by greedy search."""
    mask = torch.ones_like(ids)
    generate: Callable[..., torch.Tensor] = model.generate
    return generate(input_ids=ids, attention_mask=mask, max_new_tokens=1, do_sample=False, pad_token_id=0, **options)


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        f"Time to the first token after a switch, {found['num_tokens']:,} tokens, {found['num_layers']} layers",
        "",
        "| organs from layer | prompt read again, s | from the prefill, s | ratio | share of layers | LoRA, s |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for case in found["cases"]:
        lines.append(
            f"| {case['entry']} | {case['whole_seconds']:.3f} | {case['shared_seconds']:.3f} | {case['ratio']:.3f} "
            f"| {case['share_of_layers']:.3f} | {found['lora_seconds']:.3f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
