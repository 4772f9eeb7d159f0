"""Take a transplanted model to vLLM and llama.cpp: merge it, and convert the merged folder to GGUF.

python examples/export_gguf.py me/smollm2-kjv merged
vllm serve merged                                        # a plain native model: nothing of not_hf is in it

git clone --depth 1 https://github.com/ggml-org/llama.cpp
pip install gguf sentencepiece llama-cpp-python          # the last one builds llama.cpp, to compare
python examples/export_gguf.py me/smollm2-kjv merged --llama-cpp llama.cpp --prompt "In the beginning"
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from not_hf import TransplantedForCausalLM


def merge(donor: str, base: str | None, folder: Path) -> None:
    """Write the base with the organ in it, and its tokenizer, as a native model."""
    sources = [donor] if base is None else [base, donor]
    model = TransplantedForCausalLM.from_pretrained(*sources, dtype="auto")
    model.merge_and_unload().save_pretrained(folder)  # raises where the native class could not hold the layers
    AutoTokenizer.from_pretrained(donor if base is None else base).save_pretrained(folder)
    print(f"{folder}: {model.config.architectures[0]} with {model.config.num_hidden_layers} layers")


def convert(folder: Path, llama_cpp: Path, outtype: str) -> Path:
    """Have llama.cpp's own converter write a GGUF file beside the merged model."""
    gguf = folder / f"model-{outtype}.gguf"
    converter = [sys.executable, str(llama_cpp / "convert_hf_to_gguf.py"), str(folder)]
    subprocess.run([*converter, "--outfile", str(gguf), "--outtype", outtype], check=True)
    print(f"{gguf}: {gguf.stat().st_size / 1e6:.0f} MB")
    return gguf


def compare(folder: Path, gguf: Path, prompt: str, num_tokens: int) -> bool:
    """Whether llama.cpp goes on with the prompt, greedily, as the merged model does."""
    from llama_cpp import Llama

    ids = AutoTokenizer.from_pretrained(folder)(prompt).input_ids
    native = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ours = native.generate(torch.tensor([ids]), max_new_tokens=num_tokens, do_sample=False, eos_token_id=None)
    there = Llama(str(gguf), n_ctx=len(ids) + num_tokens, n_batch=512, verbose=False)
    stream = there.generate(ids, temp=0.0, repeat_penalty=1.0)
    theirs = [token for token, _ in zip(stream, range(num_tokens), strict=False)]
    equal = theirs == ours[0, len(ids) :].tolist()
    print(
        f"llama.cpp: {there.detokenize(theirs).decode(errors='replace')!r}, {'the same' if equal else 'NOT the same'}"
    )
    return equal


def main() -> int:
    """Merge; convert and compare if asked to."""
    parser = argparse.ArgumentParser(description="Merge an organ into its base, and convert the result to GGUF.")
    parser.add_argument("donor", help="folder or Hub ID")
    parser.add_argument("folder", type=Path, help="where the merged model is written")
    parser.add_argument("--base", help="recipient, if not the base that the donor names")
    parser.add_argument("--llama-cpp", type=Path, help="a checkout of llama.cpp; without it, nothing is converted")
    parser.add_argument("--outtype", default="f32", help="of the GGUF file: f32, f16, bf16, q8_0, …")
    parser.add_argument("--prompt", help="compare what llama.cpp makes of it (needs llama-cpp-python)")
    parser.add_argument("--tokens", type=int, default=16, help="how many of them are compared")
    args = parser.parse_args()
    merge(args.donor, args.base, args.folder)
    if args.llama_cpp is None:
        return 0
    gguf = convert(args.folder, args.llama_cpp, args.outtype)
    return 0 if args.prompt is None or compare(args.folder, gguf, args.prompt, args.tokens) else 1


if __name__ == "__main__":
    raise SystemExit(main())
