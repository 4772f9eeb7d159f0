"""Let the base draft for a transplanted model; compile the model, and swap its organ without recompiling.

python examples/fast_generation.py me/smollm2-kjv --swap me/smollm2-kjv-2 --prompt "In the beginning"
"""

from __future__ import annotations

import argparse

from torch._dynamo.utils import counters
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer

from not_hf import TransplantedForCausalLM


def main() -> None:
    """Generate by assisted decoding; then stream the same from the compiled model, and again after a swap."""
    parser = argparse.ArgumentParser(description="Assisted and compiled generation with an organ.")
    parser.add_argument("donor", help="folder or Hub ID")
    parser.add_argument("--swap", help="another organ of the same span, to take its place")
    parser.add_argument("--prompt", default="In the beginning")
    parser.add_argument("--tokens", type=int, default=20)
    parser.add_argument("--backend", default="inductor", help="of torch.compile")
    args = parser.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(args.donor)
    model = TransplantedForCausalLM.from_pretrained(args.donor, donor_name="organ").eval()
    inputs = tokenizer(args.prompt, return_tensors="pt")
    options = {"max_new_tokens": args.tokens, "do_sample": False}

    drafter = AutoModelForCausalLM.from_pretrained(model.base_config.name_or_path).eval()
    out = model.generate(**inputs, assistant_model=drafter, **options)
    print("assisted by its base:", tokenizer.decode(out[0]))

    model.compile(backend=args.backend, fullgraph=True)  # one graph, or an error
    streamer = TextStreamer(tokenizer)
    model.generate(**inputs, cache_implementation="static", streamer=streamer, **options)
    graphs = counters["stats"]["unique_graphs"]
    if args.swap:
        model.hotswap_donor("organ", args.swap)  # new weights in the old tensors: every graph stays valid
        model.generate(**inputs, cache_implementation="static", streamer=streamer, **options)
    print(f"graphs: {graphs}, after the swap {counters['stats']['unique_graphs'] - graphs} more")


if __name__ == "__main__":
    main()
