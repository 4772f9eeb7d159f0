"""What a sweep over all positions costs, against measuring the organ at one position after the other.

    python benchmarks/sweep.py            # SmolLM2-135M-Instruct, 31 positions, 1,024 tokens (make bench-sweep)
    python benchmarks/sweep.py --quick    # a small random model, for the test suite

`sweep_positions` runs the layers below a position once. Beside it `perplexity` measures the same text without the
organ and with it loaded at each position. Both in processor seconds. The numbers that both give must be the same.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

from methods import load, seconds_used
from record import small_base
from texts import ROOT, documents

sys.path[:0] = [str(ROOT / "examples")]
import demo  # noqa: E402 (the base; commit, versions and hardware)


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Measure, print the table, write the numbers."""
    parser = argparse.ArgumentParser(description="A sweep over positions, and one position after the other.")
    parser.add_argument("--quick", action="store_true", help="a small model, for the test suite")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args(arguments)
    size = {"num_tokens": 256, "window": 64} if options.quick else {}
    with tempfile.TemporaryDirectory() as scratch:
        base = small_base(Path(scratch)) if options.quick else demo.unpack_base(options.cache)
        found = compare(str(base), **size)
    found |= {"commit": demo.commit(), **demo.provenance(__file__)}
    print(table(found))
    if options.output:
        options.output.write_text(json.dumps(found, indent=2) + "\n")
    return found


def compare(base: str, num_tokens: int = 1024, window: int = 256) -> dict[str, Any]:
    """Measure an organ of three layers at all positions in both ways."""
    import torch
    from transformers import AutoTokenizer

    from not_hf import DonorModel, TransplantedForCausalLM, perplexity, sweep_positions

    torch.set_num_threads(1)
    model, tokenizer = load(base), AutoTokenizer.from_pretrained(base)
    depth = model.config.num_hidden_layers
    donor = DonorModel.from_base(model, (depth // 3, depth // 3 + 3), mode="insert")
    text = tokenizer.decode(tokenizer(documents("kjv")[0])["input_ids"][:num_tokens])
    how = {"tokenizer": tokenizer, "max_length": window, "add_start_token": False}
    start = seconds_used()
    sweep = sweep_positions(model, donor, [text], **how)
    begin = seconds_used()
    found = [perplexity.compute(predictions=[text], model=model, **how)["perplexity"]]
    for row in sweep.rows:
        recipient = TransplantedForCausalLM.from_pretrained(model, donor, position=row["position"])
        found.append(perplexity.compute(predictions=[text], model=recipient, **how)["perplexity"])
        recipient.unload()
    seconds = {"sweep": begin - start, "one_by_one": seconds_used() - begin}
    for one, row in zip(found, [sweep.base, *sweep.rows], strict=True):
        assert math.isclose(one, row["perplexity"], rel_tol=1e-4), (one, row)
    about = {"num_layers": depth, "vocab_size": model.config.vocab_size, "num_tokens": sweep.num_tokens}
    return {**about, "positions": len(sweep.rows), "window": window, "seconds": seconds}


def table(found: dict[str, Any]) -> str:
    """The numbers as Markdown."""
    sweep, one_by_one = (found["seconds"][way] for way in ("sweep", "one_by_one"))
    where = f"{found['positions']} positions of {found['num_layers']} layers"
    cells = (where, f"{one_by_one:.1f}", f"{sweep:.1f}", f"{sweep / one_by_one:.3f}")
    return "\n".join(
        [
            f"An organ of 3 layers, {found['num_tokens']:,} tokens in windows of {found['window']}, vocabulary of "
            f"{found['vocab_size']:,}",
            "",
            "| | one position after the other, s | sweep, s | ratio |",
            "| --- | ---: | ---: | ---: |",
            f"| {' | '.join(cells)} |",
        ]
    )


if __name__ == "__main__":
    main()
