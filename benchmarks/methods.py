"""Ways of fine-tuning that the benchmarks hold against each other, and one training run of one of them."""

from __future__ import annotations

import itertools
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Setting = tuple[float, int]  # learning rate, rows per batch


@dataclass(frozen=True)
class Method:
    """What is trained, and how.

    Args:
        settings: Learning rates and batch sizes that are tried.
        lora: Options of PEFT's `LoraConfig`, or `None`.
        span: Part of the stack that an organ, or LoRA, covers: 0 is the first layer, 1 the end.
        modules: Parts of the layers that an organ holds.
        num_layers: How many layers of the span, from its first; `None`: all.
        inserted: An organ is inserted behind its span, beginning as a no-op, and not put in its place.
        position: Place in the stack, as in `span`, where an inserted organ goes instead.
        donor_trainer: Trained by `DonorTrainer`, which computes the loss in chunks.
        cached: The outputs of the layers below are computed once for each row.
        plus: LoRA+: how much faster `B` learns than `A`.
    """

    settings: tuple[Setting, ...]
    lora: dict[str, Any] | None = None
    span: tuple[float, float] = (0, 1)
    modules: str | tuple[str, ...] = "all"
    donor_trainer: bool = False
    cached: bool = False
    plus: float | None = None
    inserted: bool = False
    num_layers: int | None = None
    position: float | None = None


def lora(rank: int, **options: Any) -> dict[str, Any]:
    """LoRA on all linear layers, with `lora_alpha` twice the rank."""
    return {"r": rank, "lora_alpha": 2 * rank, **options}


def rates(*values: float, batch: int = 2) -> tuple[Setting, ...]:
    """Learning rates at one batch size."""
    return tuple((value, batch) for value in values)


SEARCH_SEED = 100  # of the runs by which a learning rate is chosen
REFERENCE = "LoRA, r = 16"
INSERTED = "organ, three layers inserted early"  # as in arXiv 2601.13580: of GPT-2 layers 4 to 6, before layer 1
LOWER, UPPER = (0.0, 0.5), (0.5, 1.0)
CACHED = {"donor_trainer": True, "cached": True}
METHODS: dict[str, Method] = {
    REFERENCE: Method(rates(5e-4, 1e-3, 2e-3, 4e-3, 8e-3), lora(16)),
    "LoRA, r = 64": Method(rates(2.5e-4, 5e-4, 1e-3), lora(64)),
    "LoRA, r = 256": Method(rates(1.2e-4, 2.5e-4, 5e-4), lora(256)),
    "rsLoRA, r = 64": Method(rates(6e-5, 1.2e-4, 2.5e-4), lora(64, use_rslora=True)),
    "LoRA+, r = 16": Method(rates(1.2e-4, 2.5e-4, 5e-4), lora(16), plus=8),
    "LoRA, r = 16, loss in chunks": Method(rates(5e-4, 1e-3, 2e-3), lora(16), donor_trainer=True),
    "LoRA, r = 16, upper half, cache": Method(rates(1e-3, 2e-3, 4e-3, 8e-3), lora(16), UPPER, **CACHED),
    "full": Method(rates(3e-5, 6e-5, 1.2e-4)),
    "organ, all layers": Method(rates(5e-5, 1e-4, 2e-4), donor_trainer=True),
    "organ, outputs": Method(rates(2e-4, 3e-4, 4.5e-4, 6.5e-4, 9e-4), modules="outputs", donor_trainer=True),
    "organ, outputs, values and up": Method(
        rates(1e-4, 1.4e-4, 2e-4, 3e-4, 4.5e-4),
        modules=("v_proj", "o_proj", "up_proj", "down_proj"),
        donor_trainer=True,
    ),
    "organ, outputs of the lower half": Method(
        rates(2e-4, 4.5e-4, 9e-4), span=LOWER, modules="outputs", donor_trainer=True
    ),
    "organ, outputs of the upper half": Method(
        rates(2e-4, 4.5e-4, 9e-4), span=UPPER, modules="outputs", donor_trainer=True
    ),
    "organ, upper half, cache": Method(rates(1e-4, 2e-4, 4e-4), span=UPPER, **CACHED),
    "organ, inserted": Method(rates(2.5e-4, 5e-4, 1e-3), span=(1 / 3, 13 / 30), donor_trainer=True, inserted=True),
    INSERTED: Method(
        rates(3e-4, 1e-3, 3e-3), span=(1 / 3, 1), donor_trainer=True, inserted=True, num_layers=3, position=0.12
    ),
    "organ, inserted higher": Method(rates(5e-4), span=(2 / 3, 23 / 30), donor_trainer=True, inserted=True),
}


@dataclass
class Prepared:
    """A model that is ready to be trained by a method; `name` is that of its organ or adapter."""

    model: Any
    method: Method
    base: str
    name: str = "default"

    def set_scale(self, scale: float) -> None:
        """Move the weights to base + scale · (trained − base)."""
        import torch
        from peft.tuners.lora import LoraLayer

        if self.method.lora is not None:
            for module in self.model.modules():
                if isinstance(module, LoraLayer):
                    module.set_scale(self.name, scale)
        elif self.method.donor_trainer:
            self.model.set_donor_scale(self.name, scale)
        else:
            if not hasattr(self, "_ends"):
                start = load(self.base)
                trained = [each.detach().clone() for each in self.model.parameters()]
                self._ends = list(zip(start.parameters(), trained, strict=True))
            with torch.no_grad():
                for parameter, (begin, end) in zip(self.model.parameters(), self._ends, strict=True):
                    parameter.copy_(torch.lerp(begin, end, scale))


def device() -> str:
    """Where models are trained: on the GPU, if there is one."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def load(folder: str) -> Any:
    """A model, in float32, where it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model.to(device())


def prepare(name: str, base: str) -> Prepared:
    """Load the base and put in what the method trains."""
    from not_hf import TransplantedForCausalLM

    method = METHODS[name]
    model = load(base)
    if method.lora is not None:
        return Prepared(with_lora(model, method), method, base)
    if method.donor_trainer:
        model = TransplantedForCausalLM.from_pretrained(model, cut(method, model), is_trainable=True)
    return Prepared(model, method, base)


def with_lora(model: Any, method: Method) -> Any:
    """A model with LoRA on all linear modules of its layers, and nowhere else."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers.pytorch_utils import Conv1D

    depth, kinds = model.config.num_hidden_layers, (torch.nn.Linear, Conv1D)
    stacks = (part for part in model.modules() if isinstance(part, torch.nn.ModuleList) and len(part) == depth)
    layer = next(stacks)[0]
    linear = {name.rpartition(".")[2] for name, part in layer.named_modules() if isinstance(part, kinds)}
    layers = list(range(*span_of(method, model)))
    return get_peft_model(model, LoraConfig(target_modules=linear, layers_to_transform=layers, **method.lora))


def cut(method: Method, base: Any) -> Any:
    """The organ of a method as it begins."""
    from not_hf import DonorModel

    modules = method.modules if isinstance(method.modules, str) else list(method.modules)
    place: dict[str, Any] = {"mode": "insert", "init": "identity"} if method.inserted else {"mode": "replace"}
    if method.position is not None:
        place["position"] = round(method.position * base.config.num_hidden_layers)
    return DonorModel.from_base(base, span_of(method, base), **place, modules=modules)


def span_of(method: Method, base: Any) -> tuple[int, int]:
    """The layers of a base that a method covers, `[begin, end)`."""
    begin, end = (round(part * base.config.num_hidden_layers) for part in method.span)
    return begin, min(end, begin + (method.num_layers or end))


def fit(
    prepared: Prepared, rows: Sequence[tuple[list[int], list[int]]], *, rate: float, batch: int, steps: int, seed: int,
    decay: bool = True, gradient_checkpointing: bool = False, bf16: bool = False, every: int = 0,
    measure: Callable[[int], bool] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Train on rows in their order, over and over; without dropout and weight decay, with AdamW.

    Args:
        rows: Token ids and labels of each row.
        decay: The rate falls to 0 in a line; else it stays after the warm-up.
        every: Steps between two calls of `measure`, whose time does not count, and which says whether to stop.

    Returns:
        Seconds at the end of each step (`seconds_used`), the loss of each step's rows before it (nats per token), and
        the number of trained parameters.
    """
    from torch.utils.data import SequentialSampler
    from transformers import PrinterCallback, Trainer, TrainerCallback

    from not_hf import DonorTrainer

    method, ends, losses, clock = prepared.method, [], [], {"start": 0.0, "measuring": 0.0}

    class Clock(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            clock["start"] = seconds_used()

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            now = seconds_used()
            ends.append(now - clock["start"] - clock["measuring"])
            if every and measure and state.global_step % every == 0:
                control.should_training_stop |= measure(state.global_step)
                clock["measuring"] += seconds_used() - now

        def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any], **kwargs: Any) -> None:
            losses.extend([logs["loss"]] if "loss" in logs else [])

    parent: type[Trainer] = DonorTrainer if method.donor_trainer else Trainer

    class InOrder(parent):  # type: ignore[misc, valid-type]
        def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
            return SequentialSampler(self.train_dataset)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            if method.plus:
                import torch
                from peft.optimizers import create_loraplus_optimizer

                self.optimizer = create_loraplus_optimizer(
                    prepared.model, torch.optim.AdamW, lr=rate, loraplus_lr_ratio=method.plus, weight_decay=0.0
                )
                return self.optimizer
            return super().create_optimizer(*args, **kwargs)

    with tempfile.TemporaryDirectory() as folder:
        arguments = training_arguments(
            folder,
            **{"rate": rate, "batch": batch, "steps": steps, "seed": seed},
            lr_scheduler_type="linear" if decay else "constant_with_warmup",
            logging_steps=1,
            gradient_checkpointing=gradient_checkpointing,
            bf16=bf16,
            remove_unused_columns=False,
        )
        options = {"cache_prefix": True, "prefix_dir": Path(folder, "prefixes")} if method.cached else {}
        trainer = InOrder(prepared.model, arguments, padded, list(rows), callbacks=[Clock()], **options)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return {
        "ends": [round(each, 3) for each in ends],
        "losses": [round(each, 5) for each in losses],
        "trained": sum(each.numel() for each in prepared.model.parameters() if each.requires_grad),
    }


def seconds_used() -> float:
    """Seconds of the processor; on a GPU of the clock, when all that it was told to do is done."""
    import torch

    if device() == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def training_arguments(folder: str, *, rate: float, batch: int, steps: int, seed: int, **others: Any) -> Any:
    """What every run gives a `Trainer`: a short warm-up, no weight decay, nothing saved or shown."""
    from transformers import TrainingArguments

    return TrainingArguments(
        folder,
        max_steps=steps,
        per_device_train_batch_size=batch,
        learning_rate=rate,
        warmup_steps=max(1, min(steps // 10, 8)),
        weight_decay=0.0,
        seed=seed,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=device() == "cpu",
        **others,
    )


def padded(rows: list[tuple[list[int], list[int]]]) -> dict[str, Any]:
    """A batch of rows, padded on the right."""
    import torch
    from torch.nn.utils.rnn import pad_sequence

    ids, labels = ([torch.tensor(row[n]) for row in rows] for n in (0, 1))
    mask = pad_sequence([torch.ones_like(each) for each in ids], batch_first=True)
    labels = pad_sequence(labels, batch_first=True, padding_value=-100)
    return {"input_ids": pad_sequence(ids, batch_first=True), "attention_mask": mask, "labels": labels}


def seconds_per_step(ends: list[float], skip: int = 1) -> float:
    """Median processor seconds of a step; the first ones set up."""
    return statistics.median(later - earlier for earlier, later in itertools.pairwise(ends[skip - 1 :]))


def row_losses(model: Any, rows: Any) -> list[float]:
    """Mean loss of each row (nats per token), in evaluation mode and without caches."""
    import torch
    from torch.nn import functional

    training, found = model.training, []
    model.eval()
    with torch.no_grad():
        for part in rows.to(model.device).split(4):
            logits = model(input_ids=part, use_cache=False).logits[:, :-1].transpose(1, 2)  # (rows, vocab, block - 1)
            found += functional.cross_entropy(logits, part[:, 1:], reduction="none").mean(1).tolist()
    model.train(training)
    return [round(each, 5) for each in found]


def spread(values: Sequence[float], form: str = ".2f") -> str:
    """The median, with the smallest and the largest value behind it where they look different."""
    low, middle, high = (f"{value:{form}}" for value in (min(values), statistics.median(values), max(values)))
    return middle + (f" ({low}–{high})" if low != high else "")


def mean(values: list[float]) -> float:
    """The arithmetic mean."""
    return math.fsum(values) / len(values)
