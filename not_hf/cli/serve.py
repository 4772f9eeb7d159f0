"""`not-hf serve`."""

from __future__ import annotations

import importlib.util
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import typer

from not_hf.cli.app import app, failing_in_one_line
from not_hf.cli.options import Donor
from not_hf.cli.run import PASS_ON, run


@app.command("serve", epilog="Example: [bold]not-hf serve me/gpt2-kjv --port 8000[/bold]", context_settings=PASS_ON)
def serve(
    donor: Donor,
    arguments: Annotated[
        list[str] | None, typer.Argument(help="Options of `transformers serve`.", show_default=False)
    ] = None,
) -> None:
    """Serve an organ over the OpenAI API: its base, with the organ merged, by `transformers serve`.

    The merged model is written to a temporary folder (TMPDIR says where) and removed at the end. The model's name is
    the donor's: its ID, or the name of its folder. It needs the serving extra of transformers.
    """
    from not_hf import merge_donor

    if importlib.util.find_spec("uvicorn") is None:
        raise typer.BadParameter('serving needs pip install "transformers[serving]"')
    name = Path(donor).resolve().name if os.path.isdir(donor) else str(donor)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the folder is removed
    with tempfile.TemporaryDirectory(prefix="not-hf-serve-") as folder:
        with failing_in_one_line(debug=bool(os.environ.get("NOT_HF_DEBUG"))):
            merge_donor(donor, Path(folder, name))
        os.chdir(folder)  # where the name is that of a folder
        run("transformers.cli.transformers", ["serve", name, *(arguments or [])])
