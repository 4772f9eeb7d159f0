"""An organ in a recipient of 8-bit weights, on a CPU: it stays in its own dtype beside them.

pip install optimum-quanto
python examples/quantized.py --donor me/my-organ
python examples/quantized.py --donor me/my-organ --merged merged-model    # 8-bit weights made plain again
"""

from __future__ import annotations

import argparse

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, QuantoConfig

from not_hf import TransplantedForCausalLM


@torch.no_grad()
def main(arguments: list[str] | None = None) -> None:
    """Quantize a base while it loads, transplant, compare, and merge if asked to."""
    parser = argparse.ArgumentParser(description="An organ in an 8-bit recipient.")
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M")
    parser.add_argument("--donor", required=True, help="donor folder or Hub ID")
    parser.add_argument("--prompt", default="The best way to learn is")
    parser.add_argument("--merged", help="folder for the merged model, dequantized")
    options = parser.parse_args(arguments)

    # any quantization_config of transformers: BitsAndBytesConfig where a GPU is, TorchAoConfig, …
    eight_bits = QuantoConfig(weights="int8")
    tokens = AutoTokenizer.from_pretrained(options.base)(options.prompt, return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(options.base, quantization_config=eight_bits)
    expected = base(tokens).logits

    model = TransplantedForCausalLM.from_pretrained(base, options.donor)
    print("with the organ:", model.generate(tokens, max_new_tokens=8)[0].tolist())
    with model.disable_donors():
        print("disabled: the quantized base, bit for bit:", torch.equal(model(tokens).logits, expected))

    if options.merged:
        # without `dequantize=True` this is refused: a native file holds no mix of 8-bit and plain layers
        model.merge_and_unload(dequantize=True).save_pretrained(options.merged)
        print("merged:", options.merged)


if __name__ == "__main__":
    main()
