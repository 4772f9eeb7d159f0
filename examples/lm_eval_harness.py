"""Compare an organ with its base on tasks of lm-evaluation-harness; the model is loaded once.

    pip install lm_eval
    python examples/lm_eval_harness.py me/smollm2-kjv --tasks lambada_openai,arc_easy --limit 200

The harness's own command takes an organ's ID as well, where not_hf starts it:

    not-hf run lm_eval --model hf --model_args pretrained=me/smollm2-kjv --tasks arc_easy
"""

from __future__ import annotations

import argparse
import contextlib

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoTokenizer

from not_hf import TransplantedForCausalLM


def main() -> None:
    """Score the transplanted model, then the same model with its organs disabled."""
    parser = argparse.ArgumentParser(description="Compare an organ with its base on lm-evaluation-harness tasks.")
    parser.add_argument("donor", help="folder or Hub ID")
    parser.add_argument("--tasks", default="lambada_openai", help="names, separated by commas")
    parser.add_argument("--include-path", help="folder with tasks of your own")
    parser.add_argument("--limit", type=int, help="questions per task")
    parser.add_argument("--batch-size", type=int, default=8)
    args = parser.parse_args()

    model = TransplantedForCausalLM.from_pretrained(args.donor).eval()
    tokenizer = AutoTokenizer.from_pretrained(args.donor)
    harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=args.batch_size)
    tasks = TaskManager(include_path=args.include_path)
    for name, stack in (("with the organ", contextlib.nullcontext()), ("base alone", model.disable_donors())):
        with stack:
            scores = lm_eval.simple_evaluate(
                harness, tasks=args.tasks.split(","), task_manager=tasks, limit=args.limit, bootstrap_iters=0
            )
        for task, metrics in scores["results"].items():
            numbers = {key: value for key, value in metrics.items() if isinstance(value, float)}
            print(f"{name}: {task}", *(f"{key.partition(',')[0]} {value:.4f}" for key, value in numbers.items()))


if __name__ == "__main__":
    main()
