"""Train an organ on several processes, whatever launches it.

    torchrun --nproc-per-node 2 examples/train_distributed.py --text mine.txt    # DDP
    accelerate launch --config_file examples/accelerate/fsdp2.yaml examples/train_distributed.py --text mine.txt

and likewise with `ddp.yaml` or `deepspeed_zero3.yaml`.

Base and organ are loaded on every process; then the launcher's config says who holds what. Whatever it says, a
checkpoint holds the organ as whole tensors, written by the first process, and `--resume` goes on from the last one.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from transformers import AutoTokenizer, TrainingArguments

from not_hf import DonorModel, DonorTrainer, TransplantedForCausalLM, load_text, pack


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="HuggingFaceTB/SmolLM2-135M", help="folder or Hub ID")
    parser.add_argument("--donor", help="an organ to train further; else layers of the base are copied")
    parser.add_argument("--layers", type=int, nargs=2, default=(14, 18), help="which ones")
    parser.add_argument("--text", required=True, help="what load_text takes: a file or a dataset's ID")
    parser.add_argument("--block-length", type=int, default=512)
    parser.add_argument("--batch-size", type=int, default=4, help="per process")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--save-steps", type=int, default=50)
    parser.add_argument("--learning-rate", type=float, default=1e-4)
    parser.add_argument("--output", default="organ-out")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint in --output")
    parser.add_argument("--cache-prefix", action="store_true", help="where weights are whole: DDP, or one process")
    args = parser.parse_args()

    training = TrainingArguments(
        output_dir=args.output,
        max_steps=args.steps,
        save_steps=args.save_steps,
        per_device_train_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        use_cpu=args.cpu,
        report_to=[],
        logging_steps=10,
    )
    donor = args.donor or DonorModel.from_base(args.base, layers=tuple(args.layers), mode="replace")
    model = TransplantedForCausalLM.from_pretrained(args.base, donor, is_trainable=True, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(args.base)
    trainer = DonorTrainer(
        model=model,
        args=training,
        train_dataset=pack(load_text(args.text), tokenizer, block_length=args.block_length),
        processing_class=tokenizer,
        cache_prefix=args.cache_prefix,
    )
    trainer.train(resume_from_checkpoint=args.resume)
    trainer.save_model(str(Path(args.output, "organ")))  # on every process: the tensors are gathered
    # gloo's threads may still hold gathered tensors; a process that ends before they are freed can abort or hang
    trainer.accelerator.wait_for_everyone()
    trainer.accelerator.end_training()


if __name__ == "__main__":
    main()
