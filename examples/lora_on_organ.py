"""LoRA on top of a transplanted model: trained, saved beside the organ, loaded again, and folded into the organ.

The adapter names layers by their place in the stack as it is with the organ: load the same organs first, then the
adapter. Its `adapter_config.json` names the base alone: `AutoPeftModelForCausalLM` would leave the organ out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoTokenizer

from not_hf import DonorModel, TransplantedForCausalLM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M", help="folder or Hub ID")
    parser.add_argument("--donor", help="an organ; else layers of the base are copied")
    parser.add_argument("--layers", type=int, nargs=2, default=(14, 18), help="which ones")
    parser.add_argument("--prompt", default="The heart pumps blood.")
    parser.add_argument("--output", default="organ-out")
    args = parser.parse_args()
    organ, adapter, folded = (str(Path(args.output, name)) for name in ("organ", "lora", "folded"))

    donor = args.donor or DonorModel.from_base(args.base, layers=tuple(args.layers), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(args.base, donor)
    model.save_pretrained(organ)
    lora = get_peft_model(model, LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM"))
    ids = AutoTokenizer.from_pretrained(args.base)(args.prompt, return_tensors="pt").input_ids
    optimizer = torch.optim.AdamW((p for p in lora.parameters() if p.requires_grad), lr=1e-3)
    for _ in range(5):
        loss = lora(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    lora.save_pretrained(adapter)

    again = TransplantedForCausalLM.from_pretrained(args.base, organ)
    again = PeftModel.from_pretrained(again, adapter)
    with torch.no_grad():
        print("loss after reloading:", float(again(ids, labels=ids).loss))

    # What LoRA did to the organ's layers becomes the organ's own; what it did to the base's is not part of an organ.
    merged = again.merge_and_unload()
    merged.save_pretrained(folded)
    print("organ with LoRA folded in:", folded)


if __name__ == "__main__":
    main()
