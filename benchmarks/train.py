"""Training an organ against LoRA, full fine-tuning and block expansion: same tokens, same machine, same run.

    python benchmarks/train.py            # three domains, two seeds: hours on two cores (make bench-train)
    python benchmarks/train.py --quick    # one domain, one seed, ten minutes
    python benchmarks/train.py --smoke    # a small random model, for the test suite

Every method first searches its learning rate on the first domain, with other held-out text than it is measured on.
Then, for each domain and seed, LoRA of rank 16 makes one pass over the training blocks; every other method makes as
many steps as fit into the seconds that took, going over the same blocks again where it is faster. Held-out perplexity
of the domain and of a general text (English encyclopedia) is taken on the way, and its time left out. Each run is a
process of its own, turn and turn about. Reported: tokens/s, peak memory, file size, both perplexities at the end, and
the share of LoRA's seconds after which a method is first where LoRA ends.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from extract import memory, reset_peak
from texts import ROOT, TEXTS

sys.path[:0] = [str(ROOT / "examples")]

REFERENCE = "LoRA, r = 16"
# learning rates that are tried
METHODS: dict[str, tuple[float, ...]] = {
    REFERENCE: (5e-4, 1e-3, 2e-3),
    "LoRA, r = 64": (5e-4, 1e-3, 2e-3),
    "full": (1e-4, 3e-4),
    "expansion": (5e-4, 1e-3),
    "organ, 3 upper layers": (5e-4, 1e-3, 2e-3),
    "organ, 3 upper layers, Muon": (1e-3, 2e-3),
    "organ, 8 middle layers": (3e-4, 6e-4),
    "organ, 8 middle layers, Muon": (5e-4, 1e-3),
}
QUICK_METHODS = (REFERENCE, "organ, 3 upper layers", "organ, 8 middle layers")
SIZES: dict[str, dict[str, Any]] = {
    "full": {
        "domains": ["kjv", "icd10", "french"],
        "seeds": 2,
        "steps": 60,
        "search": 20,
        "batch": 4,
        "block": 128,
        "fork": True,
    },
    "quick": {"domains": ["kjv"], "seeds": 1, "steps": 24, "search": 0, "batch": 4, "block": 128, "fork": True},
    "smoke": {"domains": ["kjv"], "seeds": 1, "steps": 4, "search": 2, "batch": 2, "block": 32, "fork": False},
}
HELD_BLOCKS, NUM_MEASURES = 24, 8


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Search rates, train, compare, print the tables, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description="Organs against other ways of fine-tuning.")
    parser.add_argument("--quick", action="store_true", help="one domain, one seed, ten minutes")
    parser.add_argument("--smoke", action="store_true", help="a small random model, for the test suite")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; quick: three")
    parser.add_argument("--domains", nargs="+", choices=[name for name in TEXTS if name != "english"])
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; the picture goes beside it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in a process of its own
    options = parser.parse_args(arguments)
    if options.run:
        print(json.dumps(train_once(**json.loads(options.run))))
        return {}
    import demo  # the commit, versions and hardware, as in its own results

    name = "quick" if options.quick else "smoke" if options.smoke else "full"
    size, commit = SIZES[name], demo.commit()
    methods = options.methods or (list(METHODS) if name == "full" else list(QUICK_METHODS))
    methods = [REFERENCE, *(method for method in methods if method != REFERENCE)]
    with tempfile.TemporaryDirectory() as scratch:
        base = small_base(Path(scratch)) if options.smoke else demo.unpack_base(options.cache)
        result: dict[str, Any] = {"size": {**size, "name": name}, "rates": {}, "runs": []}
        run = Runner(str(base), size, Path(scratch))
        for domain in options.domains or size["domains"]:
            for seed in range(size["seeds"]):
                for method in methods:
                    if method not in result["rates"]:
                        result["rates"][method] = search(run, method, domain)
                    rate = result["rates"][method]["chosen"]
                    result["runs"].append(run(method, domain, seed, rate))
                    result |= {"commit": commit, **demo.provenance()}
                    print(line(result["runs"][-1]), file=sys.stderr, flush=True)
                    if options.output:
                        options.output.write_text(json.dumps(result, indent=1) + "\n")
    compare(result["runs"])
    print(tables(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(result["runs"], options.output.with_suffix(".png"))
    return result


class Runner:
    """Starts runs in processes of their own, and remembers how long LoRA took and how fast each method steps."""

    def __init__(self, base: str, size: dict[str, Any], scratch: Path) -> None:
        self.base, self.size, self.scratch = base, size, scratch
        self.seconds = 0.0  # of LoRA on the same domain and seed
        self.per_step: dict[str, float] = {}

    def __call__(self, method: str, domain: str, seed: int, rate: float, search: bool = False) -> dict[str, Any]:
        """One run; as long as LoRA took, unless the rate is searched for."""
        steps = self.size["search"] if search else self.size["steps"]
        if not search and method != REFERENCE:
            steps = max(2, round(self.seconds / self._seconds_per_step(method, domain, rate)))
        found = self._start(method, domain, seed, rate, steps, search)
        if not search and method == REFERENCE:
            self.seconds = found["seconds"]
        return found

    def _seconds_per_step(self, method: str, domain: str, rate: float) -> float:
        """Measured once for each method, on a few blocks, with what it keeps on disk warm: seen again and again."""
        if method not in self.per_step:
            self.per_step[method] = self._start(method, domain, 0, rate, 6, True, epoch=2)["seconds_per_step"]
        return self.per_step[method]

    def _start(
        self, method: str, domain: str, seed: int, rate: float, steps: int, choosing: bool, epoch: int | None = None
    ) -> dict[str, Any]:
        given = {"base": self.base, "method": method, "domain": domain, "seed": seed, "rate": rate, "steps": steps}
        given |= {key: self.size[key] for key in ("batch", "block")}
        given |= {"epoch": epoch or self.size["steps"], "choosing": choosing}
        if not self.size["fork"]:
            return train_once(**given)
        command = [sys.executable, __file__, "--run", json.dumps(given)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{method} on {domain} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])


def search(run: Runner, method: str, domain: str) -> dict[str, Any]:
    """The rate with the least loss on text set aside for choosing."""
    rates = METHODS[method]
    if not run.size["search"]:
        return {"chosen": rates[len(rates) // 2], "searched": {}}
    found = {rate: run(method, domain, 0, rate, search=True)["curve"][-1]["domain"] for rate in rates}
    return {"chosen": min(found, key=found.__getitem__), "searched": found}


def small_base(folder: Path) -> Path:
    """A random Llama of six layers with SmolLM2's kind of tokenizer: one of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.ByteLevel(), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator([], trainers.BpeTrainer(special_tokens=["</s>"], initial_alphabet=alphabet))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"vocab_size": len(alphabet) + 1, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 10}
    LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=4)).save_pretrained(folder)
    return folder


# ---------------------------------------------------------------- one run


def train_once(
    base: str, method: str, domain: str, seed: int, rate: float, steps: int, batch: int, block: int, epoch: int,
    choosing: bool,
) -> dict[str, Any]:  # fmt: skip
    """Train, measuring on the way.

    Args:
        epoch: Steps in which all training blocks are seen once.
        choosing: Measure on the text that rates are chosen by.
    """
    import torch
    from transformers import AutoTokenizer, TrainerCallback, TrainingArguments, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(base)
    blocks = {
        "train": read_blocks(domain, tokenizer, block, epoch * batch, part="train", seed=seed),
        "domain": read_blocks(domain, tokenizer, block, HELD_BLOCKS, part="choose" if choosing else "test"),
        "control": read_blocks("english", tokenizer, block, HELD_BLOCKS, part="test"),
    }
    before = reset_peak()  # all that is imported is there; weights count, mapped ones as far as they are read
    torch.manual_seed(seed)
    model, trainer_class, options = prepare(method, base)
    curve: list[dict[str, float]] = []

    class Measure(TrainerCallback):
        """Notes losses, and when they were reached; what measuring takes does not count."""

        def __init__(self) -> None:
            self.start, self.spent = 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.note(0)
            self.start, self.spent = time.perf_counter(), 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if (state.global_step * NUM_MEASURES) // steps > ((state.global_step - 1) * NUM_MEASURES) // steps:
                self.note(state.global_step)

        def note(self, step: int) -> None:
            begun = time.perf_counter()
            losses = {name: loss(model, blocks[name]) for name in ("domain", "control")}
            seconds = begun - self.start - self.spent if step else 0.0
            curve.append({"step": step, "seconds": seconds, **losses})
            self.spent += time.perf_counter() - begun

    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder,
            max_steps=steps,
            per_device_train_batch_size=batch,
            learning_rate=rate,
            warmup_steps=max(1, steps // 10),
            lr_scheduler_type="linear",
            weight_decay=0.0,
            seed=seed,
            data_seed=seed,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=True,
            logging_steps=steps,
        )
        if "prefix_dir" in options:
            options["prefix_dir"] = Path(folder, "prefixes")
        rows = [{"input_ids": row, "labels": row} for row in blocks["train"]]
        trainer = trainer_class(
            model, arguments, default_data_collator, rows, callbacks=[watch := Measure()], **options
        )
        trainer.train()
        peak = memory("VmHWM") - before
        model.save_pretrained(Path(folder, "saved"))
        size = sum(file.stat().st_size for file in Path(folder, "saved").glob("*.safetensors"))
    del watch
    seconds = curve[-1]["seconds"]
    warm = curve[len(curve) // 2 :]
    return {
        "method": method, "domain": domain, "seed": seed, "rate": rate, "steps": steps, "seconds": seconds,
        "seconds_per_step": (warm[-1]["seconds"] - warm[0]["seconds"]) / max(1, warm[-1]["step"] - warm[0]["step"]),
        "tokens_per_second": steps * batch * block / seconds,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": size, "peak_bytes": peak, "curve": curve,
    }  # fmt: skip


def read_blocks(name: str, tokenizer: Any, block: int, most: int, part: str, seed: int = 0) -> Any:
    """Token ids, `(rows, block)`, of a part of a text: of ten documents one is to choose by and one to test with."""
    import torch
    from datasets import Dataset, disable_progress_bars

    from not_hf.data import pack

    disable_progress_bars()
    places = {"choose": (1,), "test": (0,), "train": range(2, 10)}[part]
    texts = Dataset.from_dict({"text": [text for n, text in enumerate(TEXTS[name]()) if n % 10 in places]})
    texts = texts.shuffle(seed=seed)
    lengths = itertools.accumulate(map(len, texts["text"]))
    enough = next((n for n, chars in enumerate(lengths, 1) if chars > 8 * most * block), len(texts))
    texts = texts.select(range(enough))
    return torch.tensor(pack(texts, tokenizer, block)[:most]["input_ids"])


def loss(model: Any, rows: Any) -> float:
    """Mean loss per token in nats, in evaluation mode and without caches."""
    import torch

    training = model.training
    model.eval()
    with torch.no_grad():
        sums = [float(model(input_ids=part, labels=part, use_cache=False).loss) * len(part) for part in rows.split(2)]
    model.train(training)
    return math.fsum(sums) / len(rows)


def prepare(method: str, base: str) -> tuple[Any, Any, dict[str, Any]]:
    """The model, the trainer's class and its options."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer

    from not_hf import DonorModel, DonorTrainer, TransplantedForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    total = model.config.num_hidden_layers
    if method.startswith("LoRA"):
        rank = int(method.split()[-1])
        return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")), Trainer, {}
    if method == "full":
        return model, Trainer, {}
    if method == "expansion":  # LLaMA-Pro (arXiv 2401.02415): silent copies, spread over the stack
        spans = [(total * part // 4 - 1, total * part // 4) for part in (2, 3, 4)]
        donors = [DonorModel.from_base(model, span, mode="insert", init="identity") for span in spans]
        model = TransplantedForCausalLM.from_pretrained(model, donors[0], donor_name="organ0", is_trainable=True)
        for n, donor in enumerate(donors[1:], 1):
            model.load_donor(donor, f"organ{n}", is_trainable=True)
        return model, Trainer, {}
    first = min(total * 8 // 10, total - 3)
    upper, middle = (first, first + 3), (round(total * 8 / 30), round(total * 16 / 30))
    donor = DonorModel.from_base(model, upper if "upper" in method else middle, mode="replace")
    model = TransplantedForCausalLM.from_pretrained(model, donor, is_trainable=True)
    optimizer = {"optimizer": "muon"} if method.endswith("Muon") else {}
    return model, DonorTrainer, {"cache_prefix": True, "prefix_dir": None, **optimizer}


# ---------------------------------------------------------------- comparing


def compare(runs: list[dict[str, Any]]) -> None:
    """Say of each run how it stands to LoRA's on the same domain and seed."""
    references = {(run["domain"], run["seed"]): run for run in runs if run["method"] == REFERENCE}
    for run in runs:
        reference = references[run["domain"], run["seed"]]
        goal = reference["curve"][-1]["domain"]
        run["time_to_reference"] = time_to(run["curve"], goal) / reference["seconds"]  # inf: never
        run["steps_per_second_ratio"] = reference["seconds_per_step"] / run["seconds_per_step"]
        run["memory_ratio"] = run["peak_bytes"] / reference["peak_bytes"]
        run["time_to_reference"] = None if math.isinf(run["time_to_reference"]) else run["time_to_reference"]


def time_to(curve: list[dict[str, float]], goal: float) -> float:
    """Seconds after which the domain's loss is first at `goal`, linear between measures; infinite if never."""
    for earlier, later in itertools.pairwise(curve):
        if later["domain"] <= goal:
            share = (earlier["domain"] - goal) / max(earlier["domain"] - later["domain"], 1e-12)
            return earlier["seconds"] + min(1.0, max(0.0, share)) * (later["seconds"] - earlier["seconds"])
    return math.inf


def line(run: dict[str, Any]) -> str:
    """One run in a line."""
    first, last = run["curve"][0], run["curve"][-1]
    changes = (f"{name} {math.exp(first[name]):.2f} -> {math.exp(last[name]):.2f}" for name in ("domain", "control"))
    what = f"{run['domain']} seed {run['seed']} {run['method']}, {run['rate']}"
    return f"{what}: {run['steps']} steps, {run['seconds']:.0f} s; {', '.join(changes)}"


def tables(result: dict[str, Any]) -> str:
    """The numbers as Markdown; of several seeds the mean, with the smallest and the largest behind it."""
    runs, lines = result["runs"], []
    for domain in dict.fromkeys(run["domain"] for run in runs):
        here = [run for run in runs if run["domain"] == domain]
        start = here[0]["curve"][0]
        lines += [
            f"{domain}: perplexity of the base {math.exp(start['domain']):.2f}, "
            f"of the control {math.exp(start['control']):.2f}",
            "",
            "| method | rate | trained | file, MB | tokens/s | steps/s ÷ LoRA's | peak memory ÷ LoRA's | domain "
            "| control | time to LoRA's end ÷ LoRA's time |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
        ]
        for method in dict.fromkeys(run["method"] for run in here):
            mine = [run for run in here if run["method"] == method]

            def mean(value: Callable[[dict[str, Any]], float], form: str, mine: list[Any] = mine) -> str:
                values = [value(run) for run in mine]
                spread = f" ({min(values):{form}}–{max(values):{form}})" if len(values) > 1 else ""
                return f"{statistics.mean(values):{form}}{spread}"

            times = [run["time_to_reference"] for run in mine]
            reached = " and ".join("not reached" if each is None else f"{each:.2f}" for each in times)
            lines.append(
                f"| {method} | {mine[0]['rate']:g} | {mine[0]['trained'] / 1e6:.1f} M "
                f"| {mine[0]['file_bytes'] / 1e6:.1f} "
                f"| {mean(lambda run: run['tokens_per_second'], '.0f')} "
                f"| {mean(lambda run: run['steps_per_second_ratio'], '.2f')} "
                f"| {mean(lambda run: run['memory_ratio'], '.2f')} "
                f"| {mean(lambda run: math.exp(run['curve'][-1]['domain']), '.2f')} "
                f"| {mean(lambda run: math.exp(run['curve'][-1]['control']), '.2f')} | {reached} |"
            )
        lines.append("")
    return "\n".join(lines)


def draw(runs: list[dict[str, Any]], path: Path) -> None:
    """Domain and control perplexity against seconds of training, a column for each domain."""
    from matplotlib.figure import Figure

    domains = list(dict.fromkeys(run["domain"] for run in runs))
    methods = list(dict.fromkeys(run["method"] for run in runs))
    figure = Figure(figsize=(4.2 * len(domains) + 1.8, 6), layout="constrained")
    axes = figure.subplots(2, len(domains), sharex="col", squeeze=False)
    for column, domain in enumerate(domains):
        for row, name in enumerate(("domain", "control")):
            panel = axes[row][column]
            for run in runs:
                if run["domain"] == domain:
                    points = [(each["seconds"], math.exp(each[name])) for each in run["curve"]]
                    color = f"C{methods.index(run['method'])}"
                    label = run["method"] if run["seed"] == 0 and not (row or column) else None
                    panel.plot(*zip(*points, strict=True), color=color, marker=".", linewidth=1.2, label=label)
            panel.set_ylabel("perplexity")
            panel.set_title(
                domain if name == "domain" else f"control (English), trained on {domain}", fontsize="medium"
            )
            panel.grid(alpha=0.25)
            panel.spines[["top", "right"]].set_visible(False)
        axes[-1][column].set_xlabel("seconds of training")
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize="small")
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
