r"""One organ, two recipients: trained in one model, used in another fine-tune of the same architecture.

python examples/two_recipients.py --first HuggingFaceTB/SmolLM2-135M --second HuggingFaceTB/SmolLM2-135M-Instruct \
    --text my.txt --layers 20 23
"""

from __future__ import annotations

import argparse

from transformers import AutoTokenizer, Trainer, TrainingArguments, default_data_collator

from not_hf import DonorModel, TransplantedForCausalLM, check_compatibility, load_text, pack, perplexity


def main(arguments: list[str] | None = None) -> None:
    """Train an organ in the first model, look at what differs, use it in the second."""
    parser = argparse.ArgumentParser(description="An organ trained in one model and used in another.")
    parser.add_argument("--first", default="HuggingFaceTB/SmolLM2-135M", help="the organ is trained in this one")
    parser.add_argument("--second", default="HuggingFaceTB/SmolLM2-135M-Instruct", help="and used in this one")
    parser.add_argument("--text", required=True, help="text file to train on")
    parser.add_argument("--layers", nargs=2, type=int, default=(20, 23))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--block-length", type=int, default=256)
    parser.add_argument("--folder", default="organ")
    options = parser.parse_args(arguments)

    donor = DonorModel.from_base(options.first, options.layers, mode="replace")
    model = TransplantedForCausalLM.from_pretrained(options.first, donor, is_trainable=True)
    blocks = pack(load_text(options.text), AutoTokenizer.from_pretrained(options.first), options.block_length)
    training = TrainingArguments(
        "runs", max_steps=options.steps, learning_rate=2e-4, report_to="none", save_strategy="no"
    )
    Trainer(model, training, train_dataset=blocks, data_collator=default_data_collator).train()
    model.save_pretrained(options.folder)

    found = check_compatibility(options.folder, options.second)
    if found:
        raise SystemExit("\n".join(found))
    print(*found.differences, sep="\n")

    with open(options.text, encoding="utf-8") as file:
        sample = file.read(2000)
    both = TransplantedForCausalLM.from_pretrained(options.second, options.folder)
    tokenizer = AutoTokenizer.from_pretrained(options.second)
    with both.disable_donors():
        before = perplexity.compute(predictions=[sample], model=both, tokenizer=tokenizer)
    after = perplexity.compute(predictions=[sample], model=both, tokenizer=tokenizer)
    print("without the organ: perplexity", before["mean_perplexity"])
    print("with the organ: perplexity", after["mean_perplexity"], "(on text that it was trained on)")


if __name__ == "__main__":
    main()
