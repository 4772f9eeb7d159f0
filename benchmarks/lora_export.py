"""What is left of an organ when it is saved as a LoRA adapter or as a delta of the base, by rank.

    python benchmarks/lora_export.py            # SmolLM2-135M-Instruct, minutes on two cores (make bench-lora)
    python benchmarks/lora_export.py --only deltas    # without the adapters
    python benchmarks/lora_export.py --quick    # a few steps, few ranks, for the test suite

The organ of the demo is trained (King James Bible, layers in their own place), saved as adapters of several ranks with
`to_lora`, and each adapter is loaded into the plain base by PEFT. Then it is saved as delta files, and each of them is
read back as an organ. Perplexity is measured on held-out chapters (domain) and on Python source (control), and greedy
tokens are compared with the organ's. One seed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from not_hf import DonorConfig, DonorModel, TransplantedForCausalLM, to_lora

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base, the texts, the training, the measure; commit, versions and hardware)

RANKS = (4, 16, 64, 256, None)  # None: the full rank of the widest matrix
QUICK_RANKS = (1, None)
DELTAS: tuple[dict[str, Any], ...] = (
    *({"delta": "low_rank", "rank": rank} for rank in (4, 16, 64, 256)),
    {"delta": "bfloat16"},
)
QUICK_DELTAS: tuple[dict[str, Any], ...] = ({"delta": "low_rank", "rank": 1}, {"delta": "bfloat16"})


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, export, measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="An organ as LoRA adapters and delta files of several ranks.")
    parser.add_argument("--quick", action="store_true", help="a few steps and few ranks, for the test suite")
    parser.add_argument("--only", choices=("adapters", "deltas"), help="leave out the others")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    given = parser.parse_args(arguments)
    commit, base = demo.commit(), str(demo.unpack_base(given.cache))
    options = demo.read_options(["--quick", "--steps", "12", "--lr", "2e-2"] if given.quick else [])
    options.eval_chars = 600 if given.quick else 30_000
    tokenizer, blocks, texts = demo.prepare_text(base, options)
    with tempfile.TemporaryDirectory() as scratch:
        organ = DonorModel.from_base(base, options.layers or demo.middle_layers(base), mode="replace")
        model = TransplantedForCausalLM.from_pretrained(base, organ, is_trainable=True)
        with model.disable_donors():
            untouched = demo.measure(model, tokenizer, texts)
        demo.train(model, blocks, options, Path(scratch, "run"))
        model.eval().save_pretrained(Path(scratch, "organ"))
        tokens = [demo.greedy(model, tokenizer, prompt, options.new_tokens) for prompt in demo.PROMPTS]
        rows = [
            {"what": "base", **untouched},
            {"what": "organ", **demo.measure(model, tokenizer, texts), "bytes": size(Path(scratch, "organ"))},
        ]

        def compared(other: torch.nn.Module, folder: Path) -> dict[str, Any]:
            spoken = [demo.greedy(other, tokenizer, prompt, options.new_tokens) for prompt in demo.PROMPTS]
            same = sum(ours == theirs for ours, theirs in zip(spoken, tokens, strict=True))
            return {**demo.measure(other, tokenizer, texts), "bytes": size(folder), "same_tokens": same}

        widest = max(min(p.shape) for p in organ.parameters() if p.ndim == 2)
        cases = [(rank, True) for rank in (QUICK_RANKS if given.quick else RANKS)] + [(None, False)]
        for rank, with_norms in cases if given.only != "deltas" else ():
            folder = Path(scratch, f"{rank}-{with_norms}")
            matrices = to_lora(model, "default", folder, rank or widest, with_norms=with_norms)
            lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
            what = f"LoRA, rank {rank or widest}" + ("" if with_norms else ", without norms")
            errors = torch.tensor([matrix.error for matrix in matrices])
            rows.append({"what": what, **compared(lora, folder), "error": float(errors.median())})
        deltas = QUICK_DELTAS if given.quick else DELTAS
        for form in deltas if given.only != "adapters" else ():
            what = f"delta, rank {form['rank']}" if "rank" in form else f"delta, {form['delta']}"
            folder = Path(scratch, what)
            model.save_pretrained(folder, **form)
            again, delta = TransplantedForCausalLM.from_pretrained(folder), DonorConfig.from_pretrained(folder).delta
            rows.append({"what": what, **compared(again, folder), "lost": delta["lost"]})
    found = {
        "prompts": len(tokens),
        "layers": organ.config.layers,
        "rows": rows,
        "commit": commit,
        **demo.provenance(__file__),
    }
    print(table(found))
    if given.output:
        given.output.parent.mkdir(parents=True, exist_ok=True)
        given.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def size(folder: Path) -> int:
    """Bytes of the weights in a folder."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    lines = [
        "| | domain | control | MB | lost of a change, median | lost of all changes | prompts with the same tokens |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        cells = [row["what"], f"{row['domain']:.2f}", f"{row['control']:.2f}"]
        cells.append(f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "")
        cells += [f"{row[key]:.3f}" if key in row else "" for key in ("error", "lost")]
        cells.append(f"{row['same_tokens']} of {found['prompts']}" if "same_tokens" in row else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
