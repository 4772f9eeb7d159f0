"""`not-hf train`."""

from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from not_hf.cli.app import CHECKPOINTS, Result, command, facts, output_folder, saying_how_to_resume
from not_hf.cli.loading import load_tokenizer
from not_hf.cli.options import Base, Column, Data, Donor, Dtype, Force, Output, SampleBy, Split, given
from not_hf.cli.resuming import OPTIONS, how_to_resume, last_checkpoint, require_same_options, save_options
from not_hf.cli.trained import measure_trained, save_trained
from not_hf.errors import NotHFError

# Options that decide what is learned. Of donor and base, `DonorTrainer` compares what the checkpoint holds.
_DECIDING = (
    *("data", "column", "split", "sample_by", "streaming", "replay_data", "replay_fraction", "block_length"),
    *("epochs", "max_steps", "batch_size", "lr", "warmup", "seed", "optimizer", "kl_weight", "dtype"),
)


@command("not-hf train organ --data kjv.txt --eval-data held-out.txt -o gpt2-kjv")
def train(
    donor: Donor,
    data: Data,
    output: Output,
    base: Base = None,
    column: Column = "text",
    split: Split = "train",
    sample_by: SampleBy = None,
    streaming: Annotated[
        bool, typer.Option("--streaming", help="Read the text while training; needs --max-steps.")
    ] = False,
    replay_data: Annotated[
        str | None,
        typer.Option(
            help="General text or conversations, as --data, mixed in against forgetting.", show_default=False
        ),
    ] = None,
    replay_fraction: Annotated[
        float | None,
        typer.Option(min=0.0, max=1.0, help="Share of examples from --replay-data.", show_default="0.2"),
    ] = None,
    block_length: Annotated[int, typer.Option(min=2, help="Tokens per example; of conversations, at most.")] = 512,
    epochs: Annotated[float, typer.Option(min=0, help="Passes over the text.")] = 1.0,
    max_steps: Annotated[
        int | None, typer.Option(min=1, help="Number of steps; overrides --epochs.", show_default=False)
    ] = None,
    batch_size: Annotated[int, typer.Option(min=1, help="Examples per step and device.")] = 8,
    lr: Annotated[float, typer.Option("--lr", min=0, help="Peak learning rate.")] = 2e-4,
    warmup: Annotated[float, typer.Option(min=0, help="Warm-up steps; below 1, as a fraction of all steps.")] = 0.03,
    seed: Annotated[int, typer.Option(help="For shuffling and dropout.")] = 0,
    eval_data: Annotated[
        str | None, typer.Option(help="Held-out text for perplexity, as --data.", show_default=False)
    ] = None,
    eval_split: Annotated[str, typer.Option(help="As --split, of --eval-data.")] = "train",
    control_data: Annotated[
        str | None, typer.Option(help="General text, as --data, to measure forgetting.", show_default=False)
    ] = None,
    eval_steps: Annotated[
        int | None,
        typer.Option(min=1, help="Steps between evaluations on --eval-data and --control-data.", show_default=False),
    ] = None,
    patience: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after so many evaluations without a gain on --eval-data, and keep the best organ.",
            show_default=False,
        ),
    ] = None,
    cache_prefix: Annotated[
        bool,
        typer.Option("--cache-prefix", help="Run the layers below the organ once per example; takes disk space."),
    ] = False,
    optimizer: Annotated[
        Literal["adamw", "muon"], typer.Option(help="muon: Muon for matrices, AdamW for the rest.")
    ] = "adamw",
    kl_weight: Annotated[float, typer.Option(min=0, help="Weight of the KL divergence from the base.")] = 0.0,
    domain: Annotated[str | None, typer.Option(help="What the text is, for the card.", show_default=False)] = None,
    dtype: Annotated[Dtype, typer.Option(help="dtype to train in; auto is the recipient's.")] = "float32",
    gradient_checkpointing: Annotated[
        bool, typer.Option("--gradient-checkpointing", help="Use less memory; slower.")
    ] = False,
    save_steps: Annotated[int, typer.Option(min=1, help="Steps between checkpoints.")] = 500,
    report_to: Annotated[
        list[str] | None,
        typer.Option(
            help="Tracker: trackio, tensorboard, wandb, …; all for those installed. May be repeated.",
            show_default="none",
        ),
    ] = None,
    resume: Annotated[
        bool,
        typer.Option("--resume", help="Resume from the last checkpoint in the folder, with the same options."),
    ] = False,
    force: Force = False,
) -> Result:
    """Train an organ on text or conversations, with everything else frozen, and save it as a donor with its card.

    Conversations, in a column "messages", go through the tokenizer's chat template; the assistant's turns are learned.
    Checkpoints are in OUTPUT/checkpoints during training, and are deleted at the end.
    """
    if patience and not (eval_data and eval_steps):
        raise typer.BadParameter("needs --eval-data and --eval-steps", param_hint="--patience")
    if eval_steps and not (eval_data or control_data):
        raise typer.BadParameter("needs --eval-data or --control-data", param_hint="--eval-steps")
    if replay_fraction is not None and not (replay_data and 0 < replay_fraction < 1):
        raise typer.BadParameter("needs --replay-data and a share between 0 and 1", param_hint="--replay-fraction")
    if streaming and max_steps is None:
        raise typer.BadParameter("needs --max-steps: the length of a stream is unknown", param_hint="--streaming")
    replay_fraction = replay_fraction or 0.2
    deciding = (*_DECIDING, "eval_data", "eval_split") if patience else _DECIDING  # it keeps the organ best on them
    options = {name: value for name, value in locals().items() if name in deciding}
    with output_folder(output, force or resume, can_resume=True), saying_how_to_resume(lambda: how_to_resume(output)):
        import torch
        import transformers
        from transformers import TrainingArguments
        from transformers.tokenization_utils_base import TOKENIZER_CONFIG_FILE

        from not_hf import DonorConfig, DonorTrainer, ProgressLine, TrainingCurve
        from not_hf.donor.tokenizer import TOKENIZER_FILES
        from not_hf.hub.atomic_write import replacing
        from not_hf.recipient.heads import writing_class
        from not_hf.training.early_stopping import EarlyStopping
        from not_hf.training.examples import TrainingData, collator, mix_replay
        from not_hf.training.record import trained_organs

        DonorConfig.from_pretrained(donor)  # raises for what is no donor, before the text is read
        checkpoint = last_checkpoint(output / CHECKPOINTS) if resume else None
        if resume:
            require_same_options(output / CHECKPOINTS, options)
        texts: Any = {"held-out": (eval_data, eval_split), "control": (control_data, "train")}
        how: dict[str, Any] = {"column": column, "sample_by": sample_by}
        evaluated = {
            name: TrainingData.load(source, split=part, **how) for name, (source, part) in texts.items() if source
        }
        sources = {"data": TrainingData.load(data, split=split, streaming=streaming, **how)}
        if replay_data:
            sources["replay"] = TrainingData.load(replay_data, streaming=streaming, **how)
        model: Any = writing_class(base or donor).from_pretrained(
            *((base, donor) if base else (donor,)), is_trainable=True, dtype=dtype
        )
        if not trained_organs(model):
            raise NotHFError(f"{donor} has no active organ to train; its organs are {', '.join(model.donor_config)}")
        _check_context(model, block_length)
        tokenizer = load_tokenizer(model, donor, base)
        has_chats = any(each.is_chat for each in (*evaluated.values(), *sources.values()))
        collate = collator(copy.deepcopy(tokenizer), has_chats)  # it changes how the tokenizer pads
        eval_blocks = {  # of conversations in any case, which may hold nothing to measure
            name: each.examples(tokenizer, block_length)
            for name, each in evaluated.items()
            if eval_steps or each.is_chat
        }
        blocks: Any = sources["data"].examples(tokenizer, block_length)
        if replay_data:
            replay = sources["replay"].examples(tokenizer, block_length)
            blocks = mix_replay(blocks, replay, replay_fraction, seed)
        if streaming:
            blocks = blocks.shuffle(seed=seed, buffer_size=1000)  # blocks of a Dataset are shuffled by the Trainer
        arguments = TrainingArguments(
            output_dir=str(output / CHECKPOINTS),
            num_train_epochs=epochs,
            max_steps=max_steps or -1,
            per_device_train_batch_size=batch_size,
            learning_rate=lr,
            warmup_steps=warmup,
            seed=seed,
            bf16=dtype == "float32" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(),
            dataloader_pin_memory=torch.accelerator.is_available(),
            logging_steps=10,
            disable_tqdm=False,  # so that the bar is there to be replaced
            eval_strategy="steps" if eval_steps else "no",
            eval_steps=eval_steps,
            eval_on_start=bool(eval_steps) and checkpoint is None,  # else it is in the log
            save_steps=eval_steps if eval_steps and patience else save_steps,
            load_best_model_at_end=bool(patience),
            metric_for_best_model="eval_held-out_loss" if patience else None,
            save_total_limit=2,
            include_num_input_tokens_seen="all" if collate is transformers.default_data_collator else "non_padding",
            **given(report_to=report_to),
            **_checkpointing(gradient_checkpointing),
        )
        callbacks: list[Any] = [ProgressLine(), TrainingCurve()]
        if patience:
            callbacks.append(EarlyStopping(patience))
        trainer = DonorTrainer(
            model,
            arguments,
            train_dataset=blocks,
            eval_dataset=(eval_steps and eval_blocks) or None,
            data_collator=collate,
            callbacks=callbacks,
            cache_prefix=cache_prefix,
            optimizer=None if optimizer == "adamw" else optimizer,
            kl_weight=kl_weight,
        )
        trainer.remove_callback(transformers.ProgressCallback)  # ProgressLine takes its place
        if not resume:
            shutil.rmtree(output / CHECKPOINTS, ignore_errors=True)  # now that nothing more is refused
            (output / CHECKPOINTS).mkdir(parents=True)
            save_options(output / CHECKPOINTS, options)
        trained = trainer.train(resume_from_checkpoint=checkpoint)

        trainer.note_tokens()
        save_trained(model, output, [data, *([replay_data] if replay_data else [])], domain)
        if tokenizer.name_or_path == donor or (output / TOKENIZER_CONFIG_FILE).exists():  # else it is the base's
            with replacing(output, stale=TOKENIZER_FILES) as draft:
                tokenizer.save_pretrained(draft)
        tokens_seen = max((each.tokens_seen or 0 for each in trained_organs(model).values()), default=0)
        del model, trainer
        if evaluated:
            rows_of = {name: (texts[name][0], rows) for name, rows in evaluated.items()}
            measure_trained(output, base, tokenizer, rows_of, block_length)
        _clean_up(output)
    config = DonorConfig.from_pretrained(output)
    document = {
        "folder": str(output),
        "base": base or config.base_model_name_or_path,
        "steps": trained.global_step,
        "train_loss": trained.training_loss,
        "seconds": trained.metrics["train_runtime"],
        "tokens_seen": tokens_seen,
        "metrics": config.metrics,
    }
    return Result(document, facts("Trained", _view(document, block_length if eval_steps else None, resume)))


def _view(document: dict[str, Any], block_length: int | None, resume: bool) -> dict[str, Any]:
    """Name the numbers for people: what each was measured on, and how.

    Args:
        document: The result of the command.
        block_length: That of the blocks on which perplexity was measured while training, if it was.
        resume: Whether the training was resumed: `Trainer` gives loss and time since then.
    """
    rows = {key.replace("_", " "): value for key, value in document.items() if key not in ("metrics", "train_loss")}
    steps = "the steps since it was resumed" if resume else "all steps"
    rows[f"training loss, mean of {steps}"] = document["train_loss"]
    if resume:
        rows["seconds since it was resumed"] = rows.pop("seconds")
    for name, found in (document["metrics"] or {}).items():
        on = found["measured_on"]
        how = f"{on['num_tokens']:,} tokens of {on['text']}, windows of {on['window']:,}"
        before = f"{found['before']:.4g} → " if "before" in found else ""
        rows[name.replace("_", " ")] = f"{before}{found['after']:.4g} with the organ ({how})"
    if block_length:
        rows["perplexity while training"] = f"in blocks of {block_length:,} tokens, without the text before each"
    return rows


def _clean_up(folder: Path) -> None:
    """Delete the checkpoints, and move what was written beside them (the plot, a tracker's logs) to the folder."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

    ignored = shutil.ignore_patterns(f"{PREFIX_CHECKPOINT_DIR}-*", OPTIONS)
    shutil.copytree(folder / CHECKPOINTS, folder, ignore=ignored, dirs_exist_ok=True)
    shutil.rmtree(folder / CHECKPOINTS)


def _checkpointing(wanted: bool) -> dict[str, Any]:
    """Name the option of `TrainingArguments`: transformers 5.23 renamed it, and warns about the old name."""
    from transformers import TrainingArguments

    known = TrainingArguments.__dataclass_fields__
    return {"activation_checkpointing" if "activation_checkpointing" in known else "gradient_checkpointing": wanted}


def _check_context(model: Any, block_length: int) -> None:
    from not_hf.evaluation.windows import context_of

    context = context_of(model.config)
    if block_length > context:
        raise NotHFError(
            f"block length {block_length} exceeds the recipient's context of {context} tokens; "
            f"use --block-length {context}"
        )
