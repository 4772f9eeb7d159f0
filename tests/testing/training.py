"""Small trainings that several tests need."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainingArguments

from not_hf import DonorModel, DonorTrainer, TransplantedForCausalLM
from testing.models import tiny_model

# w4 begins a user's turn, w5 the assistant's; without {% generation %}
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ ('w5 ' if m.role == 'assistant' else 'w4 ') + m.content + ' </s> ' }}{% endfor %}"
    "{% if add_generation_prompt %}w5 {% endif %}"
)


def rows(count: int = 10, length: int = 16, seed: int = 0) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, 90, (count, length), generator=generator)
    return [{"input_ids": each, "labels": each.clone()} for each in ids]


def recipient(model_type: str = "llama", span: tuple[int, int] = (2, 3), **options: Any) -> TransplantedForCausalLM:
    torch.manual_seed(0)
    base = tiny_model(model_type)
    donor = DonorModel.from_base(base, span, **{"mode": "replace", **options})
    return TransplantedForCausalLM.from_pretrained(base, donor, is_trainable=True)


def two_organs(model_type: str = "llama") -> TransplantedForCausalLM:
    """A recipient with two organs, both trainable."""
    base = tiny_model(model_type)
    donors = [DonorModel.from_base(base, span) for span in ((0, 1), (2, 3))]
    model = TransplantedForCausalLM.from_pretrained(base, donors[0], donor_name="low", is_trainable=True)
    model.load_donor(donors[1], "top", is_trainable=True)
    return model


def made(model: Any, folder: Path, data: Any = None, cls: type[Trainer] = DonorTrainer, **options: Any) -> Trainer:
    """A trainer; options of `TrainingArguments` and of the trainer may come in one."""
    known = TrainingArguments.__dataclass_fields__
    arguments = {
        "num_train_epochs": 3,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        **{key: value for key, value in options.items() if key in known},
    }
    rest = {key: value for key, value in options.items() if key not in known}
    if cls is DonorTrainer and rest.get("cache_prefix"):
        rest.setdefault("prefix_dir", folder / "prefixes")
    arguments = TrainingArguments(str(folder / "run"), **arguments)
    return cls(model, arguments, train_dataset=rows() if data is None else data, **rest)


def losses(trainer: Trainer) -> list[float]:
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def organ(model: Any) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(
    folder: Path, model: Any = None, *args: Any, **options: Any
) -> tuple[list[float], dict[str, torch.Tensor]]:
    model = recipient() if model is None else model
    trainer = made(model, folder, *args, **options)
    trainer.train()
    return losses(trainer), organ(model)


def chat(*contents: str, first: str = "user") -> list[dict[str, str]]:
    roles = ("user", "assistant") if first == "user" else ("assistant", "user")
    return [{"role": roles[n % 2], "content": content} for n, content in enumerate(contents)]
