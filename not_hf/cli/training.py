"""The command `train`."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from not_hf.cli.models import load, measure
from not_hf.cli.options import Base, Column, Data, Donor, Dtype, Force, Output, Split
from not_hf.cli.run import CHECKPOINTS, Result, command, facts, output_folder
from not_hf.errors import NotHFError

if TYPE_CHECKING:
    from not_hf import DonorConfig

CURVE = "training_curve.png"  # what `DonorTrainer` draws

Optimizer = Literal["adamw", "muon"]


@command("not-hf train organ --data kjv.txt --eval-data held-out.txt -o gpt2-kjv")
def train(
    donor: Donor,
    data: Data,
    output: Output,
    base: Base = None,
    column: Column = "text",
    split: Split = "train",
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the text while training; needs --max-steps.")
    ] = False,
    block_length: Annotated[int, typer.Option(min=2, help="Tokens per example.")] = 512,
    epochs: Annotated[float, typer.Option(min=0, help="Times through the text.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Stop after so many steps, whatever --epochs.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step and device.")] = 8,
    lr: Annotated[float, typer.Option("--lr", min=0, help="Highest learning rate.")] = 2e-4,
    warmup: Annotated[float, typer.Option(min=0, help="Steps to reach it; below 1, a fraction of all steps.")] = 0.03,
    seed: Annotated[int, typer.Option(help="Of shuffling and dropout.")] = 0,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text for perplexity, as --data.", show_default=False)
    ] = None,
    eval_split: Annotated[str, typer.Option(help="As --split, of --eval-data.")] = "train",
    control_data: Annotated[
        str | None, typer.Option(help="General text, as --data: how much of it is unlearnt.", show_default=False)
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between looks at --eval-data and --control-data.", show_default=False),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after so many looks at --eval-data without gain, and keep the best organ.",
            show_default=False,
        ),
    ] = None,
    cache_prefix: Annotated[
        bool,
        typer.Option("--cache-prefix", help="Compute what is below the organ once per example; takes disk space."),
    ] = False,
    optimizer: Annotated[Optimizer, typer.Option(help="muon: Muon for matrices, AdamW for the rest.")] = "adamw",
    kl_weight: Annotated[float, typer.Option(min=0, help="How strongly to hold on to what the base says.")] = 0.0,
    domain: Annotated[str | None, typer.Option(help="What the text is, for the card.", show_default=False)] = None,
    dtype: Annotated[Dtype, typer.Option(help="To train in; auto is the recipient's.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Slower, with less memory.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the last checkpoint in the folder.")] = False,
    force: Force = False,
) -> Result:
    """Train an organ, and nothing but the organ, on text; save it with its card.

    Checkpoints are in OUTPUT/checkpoints while it runs, and removed when it is done.
    """
    if patience and not (eval_data and eval_steps):
        raise typer.BadParameter("needs --eval-data and --eval-steps", param_hint="--patience")
    if eval_steps and not (eval_data or control_data):
        raise typer.BadParameter("needs --eval-data or --control-data", param_hint="--eval-steps")
    if streaming and max_steps is None:
        raise typer.BadParameter("needs --max-steps: a stream does not tell its length", param_hint="--streaming")
    with output_folder(output, force or resume):
        import torch
        from transformers import AutoTokenizer, EarlyStoppingCallback, TrainingArguments, default_data_collator

        from not_hf import DonorConfig, DonorTrainer, TransplantedForCausalLM
        from not_hf.training.data import load_text, pack

        if DonorConfig.from_pretrained(donor).donors is not None:
            raise NotHFError(f"{donor} holds several organs; train one of them: give its folder")
        checkpoint = _checkpoint(output / CHECKPOINTS, resume)
        tokenizer = AutoTokenizer.from_pretrained(base or donor)
        texts = {"held-out": (eval_data, eval_split), "control": (control_data, "train")}
        evaluated: Any = {
            name: load_text(source, split=part, column=column) for name, (source, part) in texts.items() if source
        }
        looked_at = {name: pack(text, tokenizer, block_length) for name, text in evaluated.items() if eval_steps}
        blocks = pack(load_text(data, split=split, column=column, streaming=streaming), tokenizer, block_length)
        if streaming:
            blocks = blocks.shuffle(seed=seed, buffer_size=1000)  # blocks of a Dataset are shuffled by the Trainer
        model: Any = TransplantedForCausalLM.from_pretrained(
            *((base, donor) if base else (donor,)), is_trainable=True, dtype=dtype
        )
        _check_context(model, block_length)
        # transformers 5.23 renamed it, and warns about the old name
        known = TrainingArguments.__dataclass_fields__
        name = "activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing"
        checkpointing: dict[str, Any] = {name: gradient_checkpointing}
        arguments = TrainingArguments(
            output_dir=str(output / CHECKPOINTS),
            num_train_epochs=epochs,
            max_steps=max_steps or -1,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            warmup_steps=warmup,
            seed=seed,
            bf16=dtype == "float32" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            **checkpointing,
            dataloader_pin_memory=torch.accelerator.is_available(),
            logging_steps=10,
            eval_strategy="steps" if eval_steps else "no",
            eval_steps=eval_steps,
            eval_on_start=bool(eval_steps),
            save_steps=eval_steps if eval_steps and patience else save_steps,
            load_best_model_at_end=bool(patience),
            metric_for_best_model="eval_held-out_loss" if patience else None,
            save_total_limit=2,
            report_to="none",
        )
        trainer = DonorTrainer(
            model,
            arguments,
            train_dataset=blocks,
            eval_dataset=looked_at or None,
            data_collator=default_data_collator,
            callbacks=[EarlyStoppingCallback(patience)] if patience else None,
            cache_prefix=cache_prefix,
            optimizer=None if optimizer == "adamw" else optimizer,
            kl_weight=kl_weight,
        )
        trained = trainer.train(resume_from_checkpoint=checkpoint)

        trainer.note_tokens()
        _save(model, output, data, domain)
        del model, trainer
        if "held-out" in evaluated:
            _measure(output, base, evaluated["held-out"]["text"])
        if (curve := output / CHECKPOINTS / CURVE).exists():
            curve.replace(output / CURVE)
        shutil.rmtree(output / CHECKPOINTS)
    config = DonorConfig.from_pretrained(output)
    document = {
        "folder": str(output),
        "base": base or config.base_model_name_or_path,
        "steps": trained.global_step,
        "train_loss": trained.training_loss,
        "seconds": trained.metrics["train_runtime"],
        "tokens_seen": config.tokens_seen,
        "metrics": config.metrics,
    }
    return Result(document, facts("Trained", document))


def _save(model: Any, folder: Path, data: str, domain: str | None) -> None:
    """Save the organ, with what it was trained on, in the donor's dtype whatever it was trained in."""
    config: DonorConfig = model.donor_config["default"]
    config.domain = domain or config.domain
    config.datasets = list(dict.fromkeys([*(config.datasets or []), _public_name(data)]))
    config.metrics = None  # those of an earlier training hold no longer
    for parameter in model.parameters():
        if parameter.requires_grad and config.dtype is not None:
            parameter.data = parameter.data.to(config.dtype)
    model.save_pretrained(folder)


def _measure(folder: Path, base: str | None, texts: Iterable[str]) -> None:
    """Write perplexity into the saved donor: measured on what was saved, as anybody will load it."""
    from not_hf import DonorModel

    found = measure(*load(str(folder), base), texts)
    donor = DonorModel.from_pretrained(folder)
    donor.config.metrics = {"perplexity": {"before": found["before"], "after": found["after"]}}
    donor.save_pretrained(folder)


def _checkpoint(folder: Path, resume: bool) -> str | None:
    """The last checkpoint in the folder, which must be there to resume; those of an earlier run go otherwise."""
    from not_hf.training.trainer import last_complete_checkpoint

    if not resume:
        shutil.rmtree(folder, ignore_errors=True)
        return None
    checkpoint = last_complete_checkpoint(folder)
    if checkpoint is None:
        raise NotHFError(f"no checkpoint in {folder} to resume from; leave out --resume")
    return checkpoint


def _check_context(model: Any, block_length: int) -> None:
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and block_length > context:
        raise NotHFError(
            f"block length {block_length} does not fit the recipient's context; use --block-length {context}"
        )


def _public_name(source: str) -> str:
    """A Hub ID as it is; of a local path only the last part, as the rest is nobody's business."""
    return os.path.basename(os.path.normpath(source)) if os.path.exists(source) else source
