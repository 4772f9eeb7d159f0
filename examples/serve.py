"""Serve an organ over the OpenAI API with `transformers serve`.

    pip install "transformers[serving]"
    python examples/serve.py me/smollm2-kjv --port 8000
    transformers chat me/smollm2-kjv http://localhost:8000

Any client of that API works; the organ's ID is the name of the model. A merged model needs none of this:
`transformers serve` takes its folder or ID as it is.
"""

from __future__ import annotations

import argparse

import transformers
from transformers.cli.serve import Serve

import not_hf

# `transformers serve` does not ask the AutoClasses for a model's class: it takes the first name in `architectures` and
# looks it up in the `transformers` module (5.24). A donor repo says DonorModel, the organ alone; what is to be served
# is the organ in its base.
transformers.DonorModel = not_hf.TransplantedForCausalLM


def main() -> None:
    """Load the organ into its base and serve it until Ctrl-C."""
    parser = argparse.ArgumentParser(description="Serve an organ over the OpenAI API.")
    parser.add_argument("donor", help="folder or Hub ID; its tokenizer must have a chat template for /v1/chat")
    parser.add_argument("--host", default="localhost")
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--device", default="auto")
    args = parser.parse_args()
    Serve(force_model=args.donor, host=args.host, port=args.port, device=args.device, log_level="info")


if __name__ == "__main__":
    main()
