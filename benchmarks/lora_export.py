"""What is left of an organ when it is saved as a LoRA adapter, by rank.

    python benchmarks/lora_export.py            # SmolLM2-135M-Instruct, minutes on two cores (make bench-lora)
    python benchmarks/lora_export.py --quick    # a few steps, two ranks, for the test suite

The organ of the demo is trained (King James Bible, layers in their own place), saved as adapters of several ranks with
`to_lora`, and each adapter is loaded into the plain base by PEFT. Perplexity is measured on held-out chapters (domain)
and on Python source (control), and greedy tokens are compared with the organ's. One seed.
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

from not_hf import DonorModel, TransplantedForCausalLM, to_lora

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base, the texts, the training, the measure; commit, versions and hardware)

RANKS = (4, 16, 64, 256, None)  # None: the full rank of the widest matrix
QUICK_RANKS = (1, None)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Train, export, measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="An organ as LoRA adapters of several ranks.")
    parser.add_argument("--quick", action="store_true", help="a few steps and two ranks, for the test suite")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    given = parser.parse_args(arguments)
    commit, base = demo.commit(), str(demo.unpack_base(given.cache))
    options = demo.read_options(["--quick", "--steps", "30", "--lr", "1e-2"] if given.quick else [])
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
        widest = max(min(p.shape) for p in organ.parameters() if p.ndim == 2)
        cases = [(rank, True) for rank in (QUICK_RANKS if given.quick else RANKS)] + [(None, False)]
        for rank, with_norms in cases:
            folder = Path(scratch, f"{rank}-{with_norms}")
            matrices = to_lora(model, "default", folder, rank or widest, with_norms=with_norms)
            lora = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), folder).eval()
            spoken = [demo.greedy(lora, tokenizer, prompt, options.new_tokens) for prompt in demo.PROMPTS]
            errors = torch.tensor([matrix.error for matrix in matrices])
            rows.append(
                {
                    "what": f"rank {rank or widest}" + ("" if with_norms else ", without norms"),
                    **demo.measure(lora, tokenizer, texts),
                    "bytes": size(folder),
                    "error": float(errors.median()),
                    "same_tokens": sum(ours == theirs for ours, theirs in zip(spoken, tokens, strict=True)),
                }
            )
    found = {
        "prompts": len(tokens),
        "layers": organ.config.layers,
        "rows": rows,
        "commit": commit,
        **demo.provenance(),
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
        "| | domain | control | MB | lost of a change, median | prompts with the same tokens |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["rows"]:
        cells = [row["what"], f"{row['domain']:.2f}", f"{row['control']:.2f}"]
        cells.append(f"{row['bytes'] / 1e6:.1f}" if "bytes" in row else "")
        cells += [f"{row['error']:.3f}", f"{row['same_tokens']} of {found['prompts']}"] if "error" in row else ["", ""]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
