"""Train an organ with TRL: first to imitate (`SFTTrainer`), then to prefer (`DPOTrainer`).

DPO holds the model against a reference. Here that is the base, the organ switched off: `reference_model` is a second
handle on the same weights, so no second copy of the base is loaded. (Without `ref_model` TRL would load one.)
"""

from __future__ import annotations

import argparse
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from not_hf import DonorModel, TransplantedForCausalLM, reference_model

DATA = Dataset.from_dict(
    {
        "prompt": ["The heart pumps", "The lungs take in", "The liver cleans"] * 8,
        "chosen": [" blood.", " air.", " blood."] * 8,
        "rejected": [" soup.", " sand.", " windows."] * 8,
    }
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M", help="folder or Hub ID")
    parser.add_argument("--donor", help="an organ to train further; else layers of the base are copied")
    parser.add_argument("--layers", type=int, nargs=2, default=(14, 18), help="which ones")
    parser.add_argument("--steps", type=int, default=20, help="of each training")
    parser.add_argument("--output", default="organ-out")
    parser.add_argument("--cpu", action="store_true")
    args = parser.parse_args()

    donor = args.donor or DonorModel.from_base(args.base, layers=tuple(args.layers), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(args.base, donor, is_trainable=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    common = {"max_steps": args.steps, "report_to": [], "use_cpu": args.cpu, "bf16": False}

    sft = SFTTrainer(
        model=model,
        args=SFTConfig(output_dir=str(Path(args.output, "sft")), learning_rate=1e-4, **common),
        train_dataset=DATA.map(lambda row: {"completion": row["chosen"]}, remove_columns=["chosen", "rejected"]),
        processing_class=tokenizer,
    )
    sft.train()

    dpo = DPOTrainer(
        model=model,
        ref_model=reference_model(model),
        args=DPOConfig(output_dir=str(Path(args.output, "dpo")), learning_rate=1e-5, **common),
        train_dataset=DATA,
        processing_class=tokenizer,
    )
    dpo.train()
    dpo.save_model(str(Path(args.output, "organ")))  # the organ alone


if __name__ == "__main__":
    main()
