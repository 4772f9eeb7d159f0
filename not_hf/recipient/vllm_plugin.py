"""The plugin of vLLM: `vllm serve DONOR` serves the base with the organ merged into it.

vLLM calls what stands under the entry point `vllm.general_plugins` in each of its processes; in the first one, before
it looks at the model. A donor on its command line is merged into a temporary folder, and the file that vLLM's variable
`VLLM_MODEL_REDIRECT_PATH` names tells it to take that folder instead. So model, tokenizer and generation config are
those of a plain model, which keeps the donor's name, and the other processes need nothing of not_hf.
"""

from __future__ import annotations

import atexit
import itertools
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

# not_hf is imported in functions: this module is imported in every process of vLLM, whatever that serves.

REDIRECT = "VLLM_MODEL_REDIRECT_PATH"  # names a JSON file that maps models to folders


def serve_donor() -> None:
    """Merge the model that vLLM is told to serve, if it is a donor, and have it serve the merged one.

    The folder is removed when this process ends. If the variable is set already, nothing is done.

    Raises:
        NotHFError: The donor cannot be merged, or a revision is asked for.
        OSError: It, or its base, cannot be read.
    """
    name = served_model(sys.argv)
    if name is None or os.environ.get(REDIRECT) or (home := _donor_folder(name)) is None:
        return
    from not_hf import NotHFError, merge_donor

    if any(argument.partition("=")[0] == "--revision" for argument in sys.argv):
        raise NotHFError(
            f"{name} is a donor, of which vLLM is given the latest commit; leave out --revision, or download that one "
            "and give its folder"
        )
    scratch, owner = tempfile.mkdtemp(prefix="not-hf-vllm-"), os.getpid()

    def remove() -> None:
        if os.getpid() == owner:  # not in what was forked
            shutil.rmtree(scratch, ignore_errors=True)

    atexit.register(remove)
    folder, redirect = Path(scratch, "merged"), Path(scratch, "redirect.json")
    merge_donor(name, folder)
    # offline, vLLM puts the folder in the Hub's cache in the place of the ID before it looks here
    redirect.write_text(json.dumps({name: str(folder), home: str(folder)}), encoding="utf-8")
    os.environ[REDIRECT] = str(redirect)


def served_model(command: Sequence[str]) -> str | None:
    """Return the model that a command of vLLM serves: `vllm serve MODEL …`, or a server's `--model MODEL`.

    Examples:
        >>> from not_hf.recipient.vllm_plugin import served_model
        >>> served_model(["vllm", "serve", "me/gpt2-kjv", "--port", "8000"])
        'me/gpt2-kjv'
        >>> served_model(["vllm", "bench", "latency", "--model", "me/gpt2-kjv"]) is None
        True
    """
    program, *arguments = command or [""]
    if arguments[:1] == ["serve"]:
        arguments = arguments[1:]
        if arguments and not arguments[0].startswith("-"):
            return arguments[0]
    elif os.path.basename(program) != "api_server.py":
        return None
    for argument, following in itertools.zip_longest(arguments, arguments[1:]):
        option, equals, value = argument.partition("=")
        if option == "--model":
            return (value if equals else following) or None
    return None


def _donor_folder(name: str) -> str | None:
    """Return where the config of a donor lies on this machine; `None` for what is none, or for vLLM to refuse."""
    from not_hf.architecture.upstream import fetch_file
    from not_hf.config import DonorConfig
    from not_hf.limits import MAX_CONFIG, read_json

    try:
        file = fetch_file(name, "config.json")
        values = read_json(file, MAX_CONFIG) if file else None
    except (OSError, ValueError):
        return None
    is_donor = isinstance(values, dict) and values.get("model_type") == DonorConfig.model_type
    return os.path.dirname(file) if file and is_donor else None
