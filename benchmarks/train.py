"""Training an organ against LoRA, full fine-tuning and block expansion: same tokens, same machine, same run.

    python benchmarks/train.py            # three domains, two seeds: hours on two cores (make bench-train)
    python benchmarks/train.py --quick    # one domain, one seed, ten minutes
    python benchmarks/train.py --long     # ten times the tokens: one domain, one seed, LoRA and two ways of organs
    python benchmarks/train.py --smoke    # a small random model, for the test suite

Every method first searches its learning rate on the first domain, with other held-out text than it is measured on.
Then, for each domain and seed, LoRA of rank 16 makes one pass over the training blocks; every other method makes as
many steps as fit into the seconds that took, going over the same blocks again where it is faster. Held-out perplexity
of the domain and of a general text (English encyclopedia) is taken on the way, and its time left out. Each run is a
process of its own; a seed's runs go turn and turn about, and seeds side by side, with an equal share of the cores.
Reported: tokens/s, peak memory, file size, both perplexities at the end, and the share of LoRA's seconds after which a
method is first where LoRA ends.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from extract import memory, reset_peak
from texts import ROOT, TEXTS

sys.path[:0] = [str(ROOT / "examples")]

REFERENCE = "LoRA, r = 16"
# learning rates that are tried, so many that none is best at an end
METHODS: dict[str, tuple[float, ...]] = {
    REFERENCE: (1e-3, 2e-3, 4e-3),
    "LoRA, r = 64": (5e-4, 1e-3, 2e-3),
    "full": (5e-5, 1e-4, 2e-4, 4e-4),
    "expansion": (5e-4, 1e-3, 2e-3, 4e-3),
    "organ, 3 upper layers": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "organ, 3 last layers": (2.5e-4, 5e-4, 1e-3, 2e-3),
    "organ, 8 middle layers": (2e-4, 4e-4, 8e-4),
    "8 spread organs": (5e-4, 1e-3, 2e-3, 4e-3),
}
SHORT: dict[str, list[str]] = {  # sizes that do not try all methods
    "quick": [REFERENCE, "organ, 3 upper layers", "organ, 8 middle layers"],
    "long": [REFERENCE, "organ, 8 middle layers", "8 spread organs"],
    "smoke": [REFERENCE, "organ, 3 upper layers", "8 spread organs"],
}
QUICK = {"domains": ["kjv"], "seeds": 1, "steps": 24, "search": 0, "batch": 4, "block": 128, "measures": 4, "held": 10}
SIZES: dict[str, dict[str, Any]] = {
    "full": {**QUICK, "domains": ["kjv", "icd10", "french"], "seeds": 2, "steps": 32, "search": 16},
    "quick": QUICK,
    "long": {**QUICK, "steps": 320, "search": 32, "measures": 10, "held": 20},
    "smoke": {**QUICK, "steps": 4, "search": 2, "batch": 2, "block": 32, "held": 4, "rates": 2},
}


def main(arguments: list[str] | None = None) -> dict[str, Any]:
    """Search rates, train, compare, print the tables, write the numbers and the picture."""
    parser = argparse.ArgumentParser(description="Organs against other ways of fine-tuning.")
    parser.add_argument("--quick", action="store_true", help="one domain, one seed, ten minutes")
    parser.add_argument("--long", action="store_true", help="ten times the tokens; one domain and seed, three methods")
    parser.add_argument("--smoke", action="store_true", help="a small random model, for the test suite")
    parser.add_argument("--methods", nargs="+", choices=METHODS, help="default: all; in the other forms two or three")
    parser.add_argument("--domains", nargs="+", choices=[name for name in TEXTS if name != "english"])
    parser.add_argument("--rates", type=Path, help="JSON file of an earlier run, to search no rate again")
    parser.add_argument("--output", type=Path, help="JSON file for the numbers; the picture goes beside it")
    parser.add_argument("--cache", type=Path, default=Path.home() / ".cache" / "not_hf", help="where the base is kept")
    parser.add_argument("--run", help=argparse.SUPPRESS)  # one run, in a process of its own
    options = parser.parse_args(arguments)
    if options.run:
        print(json.dumps(train_once(**json.loads(options.run))))
        return {}
    import demo  # the commit, versions and hardware, as in its own results

    name = next((form for form in SHORT if getattr(options, form)), "full")
    size, commit = SIZES[name], demo.commit()
    methods = options.methods or SHORT.get(name) or list(METHODS)
    methods = [REFERENCE, *(method for method in methods if method != REFERENCE)]
    domains = options.domains or size["domains"]
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(size["seeds"]) as pool:
        base = small_base(Path(scratch)) if options.smoke else demo.unpack_base(options.cache)
        run = Runner(str(base), size, in_process=options.smoke)
        known = json.loads(options.rates.read_text())["rates"] if options.rates else {}
        rates = search(run, pool, methods, domains[0], known)
        steps = dict(zip(methods, pool.map(functools.partial(run.probe, domain=domains[0]), methods), strict=True))
        result: dict[str, Any] = {"size": {**size, "name": name}, "rates": rates, "step_seconds": steps, "runs": []}

        writing = threading.Lock()

        def series(domain: str, seed: int) -> None:
            """All methods in turn, as long as LoRA took."""
            seconds = 0.0
            for method in methods:
                found = run(method, domain, seed, rates[method]["chosen"], run.fitting(seconds, steps[method]))
                seconds = seconds or found["seconds"]
                with writing:
                    result["runs"].append(found)
                    print(line(found), file=sys.stderr, flush=True)
                    if options.output:
                        options.output.write_text(json.dumps(result, indent=1) + "\n")

        for domain in domains:
            list(pool.map(functools.partial(series, domain), range(size["seeds"])))
            result |= {"commit": commit, **demo.provenance()}
    result["runs"].sort(key=lambda run: (domains.index(run["domain"]), methods.index(run["method"]), run["seed"]))
    compare(result["runs"])
    print(tables(result))
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
        draw(result["runs"], options.output.with_suffix(".png"))
    return result


class Runner:
    """Starts runs, each in a process of its own that has an equal share of the cores."""

    def __init__(self, base: str, size: dict[str, Any], in_process: bool) -> None:
        self.base, self.size, self.in_process = base, size, in_process

    def __call__(
        self, method: str, domain: str, seed: int, rate: float, steps: int, epoch: int | None = None, **options: Any
    ) -> dict[str, Any]:
        """One run; `options` are those of `train_once`."""
        given = {"base": self.base, "method": method, "domain": domain, "seed": seed, "rate": rate, "steps": steps}
        given |= {key: self.size[key] for key in ("batch", "block", "measures", "held")}
        given |= {"epoch": epoch or self.size["steps"], **options}
        if self.in_process:
            return train_once(**given)
        command = [sys.executable, __file__, "--run", json.dumps(given)]
        threads = str(max(1, (os.cpu_count() or 1) // self.size["seeds"]))
        environment = {**os.environ, "OMP_NUM_THREADS": threads}
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if done.returncode:
            raise RuntimeError(f"{method} on {domain} failed:\n{done.stderr}")
        return json.loads(done.stdout.splitlines()[-1])

    def probe(self, method: str, domain: str) -> dict[str, float]:
        """Seconds of a step, on blocks that are new and on those that were seen before."""
        at = self(method, domain, 0, 1e-4, 8, epoch=4, measures=0)["step_ends"]
        steps = [later - earlier for earlier, later in itertools.pairwise(at)]  # without the first, which sets up
        return {"new": statistics.median(steps[:3]), "seen": statistics.median(steps[3:])}

    def fitting(self, seconds: float, step: dict[str, float]) -> int:
        """Steps that fit into `seconds`; 0: one pass over the blocks."""
        once = self.size["steps"]
        new = once if not seconds else min(once, seconds / step["new"])
        seen = max(0.0, seconds - new * step["new"]) / step["seen"]
        return max(2, round(new + seen))


def search(
    run: Runner, pool: ThreadPoolExecutor, methods: list[str], domain: str, known: dict[str, dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """For each method the rate with the least loss on text set aside for choosing; `known`: what was found before."""

    def try_out(method: str, rate: float) -> float:
        if str(rate) in (before := known.get(method, {}).get("searched", {})):
            return before[str(rate)]
        steps = run.size["search"]
        return run(method, domain, 0, rate, steps, measures=1, part="choose")["curve"][-1]["domain"]

    if not run.size["search"]:
        return {method: {"chosen": METHODS[method][1], "searched": {}} for method in methods}
    rates = {method: METHODS[method][: run.size.get("rates")] for method in methods}
    pairs = [(method, rate) for method in methods for rate in rates[method]]
    losses = dict(zip(pairs, pool.map(lambda pair: try_out(*pair), pairs), strict=True))
    found = {method: {rate: losses[method, rate] for rate in rates[method]} for method in methods}
    return {method: {"chosen": min(each, key=each.__getitem__), "searched": each} for method, each in found.items()}


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
    measures: int, held: int, part: str = "test",
) -> dict[str, Any]:  # fmt: skip
    """Train, measuring on the way.

    Args:
        epoch: Steps in which all training blocks are seen once.
        measures: How often losses are taken, beside the start.
        held: Blocks of the domain and of the control they are taken on.
        part: The held-out text: what rates are chosen by, or what is reported.
    """
    import torch
    from transformers import AutoTokenizer, TrainerCallback, TrainingArguments, default_data_collator

    tokenizer = AutoTokenizer.from_pretrained(base)
    blocks = {
        "train": read_blocks(domain, tokenizer, block, epoch * batch, part="train", seed=seed),
        "domain": read_blocks(domain, tokenizer, block, held, part=part),
        "control": read_blocks("english", tokenizer, block, held, part="test"),
    }
    before = reset_peak()  # all that is imported is there; weights count, mapped ones as far as they are read
    torch.manual_seed(seed)
    model, trainer_class, options = prepare(method, base)
    curve: list[dict[str, float]] = []
    step_ends: list[float] = []

    class Measure(TrainerCallback):
        """Notes losses, and when they were reached; what measuring takes does not count."""

        def __init__(self) -> None:
            self.start, self.spent = 0.0, 0.0

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if measures > 1:
                self.note(0)
            self.start, self.spent = time.perf_counter(), 0.0

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step = state.global_step
            step_ends.append(time.perf_counter() - self.start - self.spent)
            if (step * measures) // steps > ((step - 1) * measures) // steps:
                self.note(step)

        def note(self, step: int) -> None:
            begun = time.perf_counter()
            losses = {name: loss(model, blocks[name]) for name in ("domain", "control") if measures}
            curve.append({"step": step, "seconds": step_ends[-1] if step else 0.0, **losses})
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
        trainer = trainer_class(model, arguments, default_data_collator, rows, callbacks=[Measure()], **options)
        trainer.train()
        peak = memory("VmHWM") - before
        model.save_pretrained(Path(folder, "saved"))
        size = sum(file.stat().st_size for file in Path(folder, "saved").rglob("*.safetensors"))
    seconds = step_ends[-1]
    each = [later - earlier for earlier, later in itertools.pairwise(step_ends)]
    each = each[epoch:] or each  # on blocks that were seen before, if there are such steps
    return {
        "method": method, "domain": domain, "seed": seed, "rate": rate, "steps": steps, "seconds": seconds,
        "seconds_per_step": statistics.median(each), "step_ends": step_ends,
        "tokens_per_second": steps * batch * block / seconds,
        "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "file_bytes": size, "peak_bytes": peak, "curve": curve,
    }  # fmt: skip


def read_blocks(name: str, tokenizer: Any, block: int, most: int, part: str, seed: int = 0) -> Any:
    """Token ids, `(rows, block)`, of a part of a text: of ten documents one is to choose by and one to test with."""
    import torch
    from datasets import Dataset, disable_progress_bars

    from not_hf import pack

    disable_progress_bars()
    places = {"choose": (1,), "test": (0,), "train": range(2, 10)}[part]
    texts = Dataset.from_dict({"text": [text for n, text in enumerate(documents(name)) if n % 10 in places]})
    texts = texts.shuffle(seed=seed)
    lengths = itertools.accumulate(map(len, texts["text"]))
    enough = next((n for n, chars in enumerate(lengths, 1) if chars > 8 * most * block), len(texts))
    texts = texts.select(range(enough))
    return torch.tensor(pack(texts, tokenizer, block)[:most]["input_ids"])


@functools.cache
def documents(name: str) -> list[str]:
    """A text, read once in a process."""
    return TEXTS[name]()


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
    cached = {"cache_prefix": True, "prefix_dir": None}
    places = {
        "expansion": [total * part // 4 - 1 for part in (2, 3, 4)],  # LLaMA-Pro (arXiv 2401.02415)
        "8 spread organs": [total * part // 8 for part in range(8)],
    }
    if method in places:  # silent copies of single layers, each inserted beside its original
        donors = [DonorModel.from_base(model, (n, n + 1), mode="insert", init="identity") for n in places[method]]
        model = TransplantedForCausalLM.from_pretrained(model, donors[0], donor_name="organ0", is_trainable=True)
        for n, donor in enumerate(donors[1:], 1):
            model.load_donor(donor, f"organ{n}", is_trainable=True)
        return (model, Trainer, {}) if method == "expansion" else (model, DonorTrainer, cached)
    spans = {
        "3 upper": (total - 6, total - 3),
        "3 last": (total - 3, total),
        "8 middle": (round(total * 8 / 30), round(total * 16 / 30)),
    }
    span = next(span for name, span in spans.items() if name in method)
    donor = DonorModel.from_base(model, span, mode="replace")
    model = TransplantedForCausalLM.from_pretrained(model, donor, is_trainable=True)
    return model, DonorTrainer, cached


# ---------------------------------------------------------------- comparing


def compare(runs: list[dict[str, Any]]) -> None:
    """Say of each run how it stands to LoRA's on the same domain and seed."""
    references = {(run["domain"], run["seed"]): run for run in runs if run["method"] == REFERENCE}
    for run in runs:
        reference = references[run["domain"], run["seed"]]
        goal = reference["curve"][-1]["domain"]
        run["time_to_reference"] = time_to(run["curve"], goal) / reference["seconds"]  # inf: never
        run["steps_per_second_ratio"] = reference["seconds_per_step"] / run["seconds_per_step"]
        run["seconds_ratio"] = run["seconds"] / reference["seconds"]
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
            "| method | rate | trained | file, MB | steps | time ÷ LoRA's | tokens/s | steps/s ÷ LoRA's "
            "| peak memory ÷ LoRA's | domain | control | time to LoRA's end ÷ LoRA's time |",
            "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
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
                f"| {mean(lambda run: run['steps'], '.0f')} "
                f"| {mean(lambda run: run['seconds_ratio'], '.2f')} "
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
