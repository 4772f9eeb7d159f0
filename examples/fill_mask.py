"""An organ in an encoder: cut layers of a masked LM, train them on a text, and fill masks with them.

python examples/fill_mask.py --base answerdotai/ModernBERT-base --text mine.txt --donor my-organ
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import (
    AutoModelForMaskedLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
    pipeline,
)

from not_hf import DonorModel, TransplantedForMaskedLM


def main(arguments: list[str] | None = None) -> None:
    """Cut, train, save, fill."""
    parser = argparse.ArgumentParser(description="Train an organ of an encoder on a text.")
    parser.add_argument("--base", default="answerdotai/ModernBERT-base", help="masked LM: Hub ID or folder")
    parser.add_argument("--text", type=Path, required=True, help="plain text to train on, a passage per line")
    parser.add_argument("--donor", default="fill-mask-organ", help="folder for the organ")
    parser.add_argument("--layers", nargs=2, type=int, default=(10, 14), help="half-open span of the base's layers")
    parser.add_argument("--steps", type=int, default=100)
    options = parser.parse_args(arguments)

    # BERT and RoBERTa work as well; being post-norm, they cannot start an inserted organ as a no-op, so replace
    organ = DonorModel.from_base(options.base, layers=options.layers, mode="replace")
    model = TransplantedForMaskedLM.from_pretrained(options.base, organ, is_trainable=True)
    model.print_trainable_parameters()

    tokenizer = AutoTokenizer.from_pretrained(options.base)
    lines = [line for line in options.text.read_text(encoding="utf-8").splitlines() if line.strip()]
    rows = [{"input_ids": ids} for ids in tokenizer(lines, truncation=True, max_length=128)["input_ids"]]
    trainer = Trainer(
        model,
        TrainingArguments(f"{options.donor}-run", max_steps=options.steps, learning_rate=3e-4, report_to=[]),
        train_dataset=rows,
        data_collator=DataCollatorForLanguageModeling(tokenizer, mlm_probability=0.15),
    )
    trainer.train()
    model.save_pretrained(options.donor)  # the organ alone, with its card

    fill = pipeline("fill-mask", model=AutoModelForMaskedLM.from_pretrained(options.donor), tokenizer=tokenizer)
    first, *rest = lines[0].split()
    for guess in fill(" ".join((tokenizer.mask_token, *rest)), top_k=3):
        print(f"{guess['score']:.3f}  {guess['sequence']}  (was: {first})")


if __name__ == "__main__":
    main()
