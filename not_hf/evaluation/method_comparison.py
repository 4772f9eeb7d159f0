"""Ways of fine-tuning compared on one text, at equal time."""

from __future__ import annotations

import copy
import functools
import gc
import math
import numbers
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from not_hf.architecture.stack import is_encoder
from not_hf.composition.check import check_donor
from not_hf.composition.sources import DonorLike
from not_hf.config import DonorConfig
from not_hf.donor.compatibility import check_compatibility
from not_hf.donor.modeling import DonorModel
from not_hf.errors import IncompatibleDonorError, NotHFError, UnsupportedArchitectureError
from not_hf.evaluation.bootstrap import Floats
from not_hf.evaluation.compared_methods import (
    Fresh,
    Prepared,
    donor_names,
    lora_problem,
    prepare_donor,
    prepare_full,
    prepare_lora,
    prepare_organ,
    public_name,
)
from not_hf.evaluation.comparison_page import draw, page
from not_hf.evaluation.held_out_text import HeldOut, TextParts, control_blocks
from not_hf.evaluation.method_scores import BASE, PREFIXES, Nats, best_scale, score_rows
from not_hf.evaluation.perplexity import check_texts, load_tokenizer
from not_hf.evaluation.sweep_record import write_record
from not_hf.evaluation.timed_training import train_for
from not_hf.evaluation.windows import context_of
from not_hf.recipient.heads import writing_class
from not_hf.recipient.mixin import Recipient
from not_hf.recipient.new_tokens import require_tokens
from not_hf.version import versions

SCALES = (0.0, 0.5, 0.7, 0.85, 1.0)
FULL = "full fine-tuning"
RATES = {
    "organ": 3e-4,
    "LoRA": 1e-3,
    FULL: 6e-5,
}  # in the middle of those that benchmarks/train.py tries

_TRAINED = {"organ": prepare_organ, "LoRA": prepare_lora, FULL: prepare_full}
_OUT_OF_MEMORY = "it ran out of memory; give a smaller batch_size or block_length"
_NO_COSTS = dict.fromkeys(("rate", "steps", "tokens", "seconds", "peak_bytes", "saved_bytes"))


@dataclass(frozen=True)
class MethodComparison:
    """What a model learned of a text by several methods in the same time, and what that cost.

    Args:
        rows: One dict for the base and for each method, at the scale that is best on text set aside: `method`,
            `scale`; `perplexity` with `low` and `high`, the ends of its 95 % interval; `perplexity_ratio`, the
            perplexity over that of the base, with `ratio_low` and `ratio_high`, which pair the blocks; the same of
            the control text, as `control_perplexity`, …; and `rate`, `steps`, `tokens`, `seconds` and `peak_bytes` of
            the training, and `saved_bytes`, the size of what is saved. `None` where there is nothing to say.
        front: One dict for each method and scale: `method`, `scale`, and the same numbers.
        skipped: The methods that were left out: `method` and `reason`.
        about: What was compared: `model`, `budget`, number of tokens, settings, device, versions.
        nats: Summed negative log-likelihood of each test block, by the method and `"test"` or `"control"`, for paired
            comparisons of two methods.
    """

    rows: list[dict[str, Any]]
    front: list[dict[str, Any]]
    skipped: list[dict[str, str]]
    about: dict[str, Any]
    nats: dict[str, dict[str, list[float]]] = field(repr=False)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write `compare.json`, `compare.md` for a card and, if matplotlib is installed, `compare.png` into a folder.

        Numbers that are not finite are written as null.
        """
        os.makedirs(folder, exist_ok=True)
        drawn = find_spec("matplotlib") is not None
        if drawn:
            self.plot(Path(folder, "compare.png"))
        text = page(self.rows, self.skipped, self.about, "compare.png" if drawn else None)
        Path(folder, "compare.md").write_text(text, encoding="utf-8")
        results = {"rows": self.rows, "front": self.front, "skipped": self.skipped}
        write_record(folder, {**self.about, **results, "nats": self.nats}, "compare.json")

    def plot(self, path: str | os.PathLike[str]) -> None:
        """Draw perplexity over control perplexity, a line for each method and a point for each scale.

        Without control, over the scale.

        Args:
            path: File to write: `.png`, or another format of matplotlib.

        Raises:
            NotHFError: matplotlib is not installed.
        """
        draw(self.rows, self.front, path)


def compare_methods(
    base: PreTrainedModel | str | os.PathLike[str],
    data: Iterable[str],
    control: Iterable[str] | None = None,
    *,
    budget: float = 600.0,
    donors: Iterable[DonorLike] = (),
    rates: Mapping[str, float] = RATES,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    block_length: int | None = None,
    batch_size: int = 2,
    seed: int = 0,
) -> MethodComparison:
    """Train an organ, LoRA and all weights on a text for the same time, and measure what each gains and costs.

    The text is divided: seven tenths are trained on, one tenth chooses a scale, two tenths test. Each method begins
    with the base and trains for the same seconds, with AdamW, in float32 (on CUDA in bfloat16 where it can). The
    learning rate falls to 0 in a line. Rates are not searched: try several before you publish a comparison.

    - `"organ"`: the matrices through which all layers write to the residual stream, replaced (`modules="outputs"`);
      trained by `DonorTrainer`, the others by `Trainer`.
    - `"LoRA"`: of rank 16 and alpha 32 on all linear layers; left out if PEFT is not installed, or refuses the model.
    - `"full fine-tuning"`: all weights.

    What does not fit into the memory of the accelerator is left out, too.

    Afterwards the weights are moved to base + scale · (trained − base), at the scales 0, 0.5, 0.7, 0.85 and 1, and
    measured at each. Perplexities are those of blocks, each without the text before it, so they are higher than those
    of `perplexity`. Intervals are over blocks, as of `compare_perplexity`: they say how much another text of the same
    kind might change a number, not how much another training might.

    Args:
        base: A causal LM without organs, which is left unchanged; or its Hub ID or folder.
        data: Texts of the domain. Texts shorter than a block are dealt out together with their neighbours.
        control: General texts, to measure forgetting.
        budget: Seconds for everything, about. Measuring takes half at most.
        donors: Folders, Hub IDs or `DonorModel`s that are measured as they are. If they were trained on these texts,
            the test says little of them.
        rates: Which methods are trained, with the peak learning rate of each.
        tokenizer: The tokenizer of a live model, its Hub ID or folder.
        block_length: Tokens per block, in training and measuring; default: the base's context, at most 128.
        batch_size: Blocks per step.
        seed: For the order of the blocks, LoRA's start, dropout and the intervals.

    Raises:
        IncompatibleDonorError: A donor does not fit.
        NotHFError: An argument is out of range, there is too little text, or the base has organs.
        OutOfMemoryError: The base, or every method, does not fit into the memory of the accelerator.
        UnsupportedArchitectureError: The base is no causal LM, or cannot take the organ.

    Examples:
        >>> from tokenizers import Tokenizer, models, pre_tokenizers
        >>> from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
        >>> from not_hf import compare_methods
        >>> words = Tokenizer(models.WordLevel({"</s>": 0, "in": 1, "the": 2, "beginning": 3}))
        >>> words.pre_tokenizer = pre_tokenizers.Whitespace()
        >>> tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>")
        >>> base = GPT2LMHeadModel(GPT2Config(vocab_size=4, n_embd=8, n_layer=2, n_head=2))
        >>> how = {"budget": 1, "rates": {"organ": 3e-4}, "tokenizer": tokenizer, "block_length": 8}
        >>> found = compare_methods(base, ["in the beginning"] * 50, **how)
        >>> [row["method"] for row in found.rows]
        ['base', 'organ']
    """
    started = time.perf_counter()
    config = _base_config(base)
    block_length = int(min(128, context_of(config))) if block_length is None else block_length
    _check_numbers(config, budget, rates, block_length, batch_size)
    if isinstance(donors, str | os.PathLike | DonorModel):
        raise NotHFError("donors must be a list, got a single donor; give donors=[donor]")
    donors = list(donors)
    methods, skipped = _methods(config, rates, donors)
    words = load_tokenizer(base if isinstance(base, PreTrainedModel) else os.fspath(base), tokenizer)
    for donor in donors:
        require_tokens(words, donor.config if isinstance(donor, DonorModel) else DonorConfig.from_pretrained(donor))
    parts, held = _divided(data, control, words, block_length, batch_size)

    fresh = functools.partial(_load, base)
    model = fresh()
    device = model.device.type
    scored, measuring = held.affordable(model, budget / 2, 1 + (len(SCALES) - 1) * len(methods))
    left = budget - measuring - (time.perf_counter() - started)
    seconds = max(0.95 * left, budget / 3) / max(1, len(methods.keys() & rates))  # the rest is for loading
    nats: Nats = {BASE: scored.score(model, "base")}
    costs: dict[str, dict[str, Any]] = {"base": {}}
    del model

    def measured(name: str) -> tuple[dict[str, Any], Nats]:
        torch.manual_seed(seed)
        each = methods[name](fresh)
        cost: dict[str, Any] = {"saved_bytes": each.saved_bytes}
        if name in rates:
            how: dict[str, Any] = {"rate": rates[name], "batch_size": batch_size, "seed": seed}
            cost |= {"rate": rates[name], **train_for(seconds, each, parts.train, name=name, **how)}
        return cost, _over_scales(each, scored, name, nats[BASE])

    for name in methods:
        try:
            costs[name], found = measured(name)
            nats |= found
        except torch.OutOfMemoryError:
            if name == [*methods][-1] and costs.keys() == {"base"}:
                raise
            skipped.append({"method": name, "reason": _OUT_OF_MEMORY})
        gc.collect()  # a trainer and its model refer to each other

    num_tokens = {part: len(blocks) * (block_length - 1) for part, blocks in scored.parts.items()}
    about = {
        **{"model": _name(base), "budget": budget, "seconds": round(time.perf_counter() - started, 1)},
        **{"dealt_by": parts.dealt_by, "block_length": block_length, "batch_size": batch_size, "seed": seed},
        **{"num_tokens": {"train": len(parts.train) * block_length, **num_tokens}},
        **{"device": device, "threads": torch.get_num_threads()},
        **versions(*(("peft",) if "LoRA" in methods else ())),
    }
    return _compared(nats, costs, skipped, about)


def _compared(
    nats: Nats, costs: dict[str, dict[str, Any]], skipped: list[dict[str, str]], about: dict[str, Any]
) -> MethodComparison:
    """Compute the numbers, and choose a scale for the base, which has one, and for each method."""
    front = score_rows(nats, about["block_length"] - 1, about["seed"])
    scales = {name: best_scale(nats, name) for name in costs}
    rows = [{**row, **_NO_COSTS, **costs[row["method"]]} for row in front if row["scale"] == scales[row["method"]]]
    kept = {
        name: {part: each.tolist() for part, each in nats[name, scale].items() if part in PREFIXES}
        for name, scale in scales.items()
    }
    return MethodComparison(rows, front[1:], skipped, about, kept)


def _name(base: PreTrainedModel | str | os.PathLike[str]) -> str | None:
    """Return the name of the base as it may be published, if it has one."""
    name = base.name_or_path if isinstance(base, PreTrainedModel) else os.fspath(base)
    return public_name(name) if name else None


def _base_config(base: PreTrainedModel | str | os.PathLike[str]) -> PreTrainedConfig:
    """Return the config of a base that can be compared."""
    if isinstance(base, Recipient):
        raise NotHFError("the base has organs; give the model without them (unload), and the donors as donors=[…]")
    if isinstance(base, nn.Module) and not isinstance(base, PreTrainedModel):
        raise NotHFError(
            f"the base is wrapped in {type(base).__name__}; give the model without it, of PEFT: merge_and_unload() or "
            "unload()"
        )
    if isinstance(base, PreTrainedModel):
        config = base.config
    else:
        config = AutoConfig.from_pretrained(os.fspath(base), trust_remote_code=False)
    if isinstance(config, DonorConfig):
        raise NotHFError(f"{base} is a donor; give the model that it was cut from, and the donor as donors=[{base!r}]")
    if is_encoder(config) or config.is_encoder_decoder:
        raise UnsupportedArchitectureError(f"{config.model_type} does not predict the next token; use a causal LM")
    return config


def _check_numbers(
    config: PreTrainedConfig, budget: float, rates: Mapping[str, float], block_length: int, batch_size: int
) -> None:
    if not isinstance(rates, Mapping):
        raise NotHFError(f"rates must be a dict, such as {{'organ': 3e-4}}, got {rates!r:.100}")
    numbers_above_0: dict[str, Any] = {f"rates[{name!r}]": rate for name, rate in rates.items()}
    for name, value in {"budget, in seconds,": budget, **numbers_above_0}.items():
        is_number = isinstance(value, numbers.Real)
        if not (is_number and math.isfinite(value) and value > 0):
            raise NotHFError(f"{name} must be a number above 0, got {value!r:.100}")
    if unknown := rates.keys() - _TRAINED.keys():
        raise NotHFError(f"no method {', '.join(map(repr, unknown))}; rates may name {', '.join(map(repr, RATES))}")
    if not 2 <= block_length <= (context := context_of(config)):
        raise NotHFError(f"block_length must be between 2 and {context}, the base's context, got {block_length}")
    if batch_size < 1:
        raise NotHFError(f"batch_size must be at least 1, got {batch_size}")


def _methods(
    config: PreTrainedConfig, rates: Mapping[str, float], donors: list[DonorLike]
) -> tuple[dict[str, Callable[[Fresh], Prepared]], list[dict[str, str]]]:
    """Return what prepares each method, by its name, and the methods that are left out, with the reason."""
    methods: dict[str, Callable[[Fresh], Prepared]] = {name: _TRAINED[name] for name in rates}
    skipped = []
    if "LoRA" in methods and (reason := lora_problem(config)):
        del methods["LoRA"]
        skipped.append({"method": "LoRA", "reason": reason})
    for name, donor in zip(donor_names(donors), donors, strict=True):
        check: Any = check_compatibility if isinstance(donor, DonorModel) else check_donor
        if problems := check(donor, config):
            raise IncompatibleDonorError(f"{name}: {'; '.join(problems)}")
        methods[name] = functools.partial(prepare_donor, donor)
    if not methods:
        hint = skipped[0]["reason"] if skipped else "give rates={'organ': 3e-4}, or donors=[donor]"
        raise NotHFError(f"nothing to compare; {hint}")
    return methods, skipped


def _divided(
    data: Iterable[str],
    control: Iterable[str] | None,
    words: PreTrainedTokenizerBase,
    block_length: int,
    batch_size: int,
) -> tuple[TextParts, HeldOut]:
    """Divide the text, and return the parts with what is measured."""
    texts, general = check_texts(data, "data"), None if control is None else check_texts(control, "control")
    parts = TextParts.of(texts, words, block_length)
    if len(parts.train) < batch_size:
        raise NotHFError(f"the text has {len(parts.train)} blocks to train on, fewer than batch_size={batch_size}")
    held = {"choose": parts.choose, "test": parts.test}
    if general is not None:
        held["control"] = control_blocks(general, words, block_length)
    return parts, HeldOut.of(held)


def _load(base: PreTrainedModel | str | os.PathLike[str]) -> PreTrainedModel:
    """Return the base in float32: a copy of a live one, where that is; else on the accelerator if there is one."""
    if isinstance(base, PreTrainedModel):
        return copy.deepcopy(base).float()
    native: Any = writing_class(os.fspath(base)).native_auto_class
    model = native.from_pretrained(base, dtype=torch.float32)
    return cast(PreTrainedModel, model.to(torch.accelerator.current_accelerator(check_available=True) or "cpu"))


def _over_scales(each: Prepared, scored: HeldOut, name: str, base: dict[str, Floats]) -> Nats:
    """Measure a method at each scale that it has."""
    found = {(name, 0.0): base} if each.is_scalable else {}
    for scale in SCALES[1:] if each.is_scalable else (1.0,):
        each.set_scale(scale)
        found[name, scale] = scored.score(each.model, f"{name} at scale {scale:g}")
    return found
