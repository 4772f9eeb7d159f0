"""What to type where a donor was looked for and only a pickled one is there."""

from __future__ import annotations

import contextlib
import os
import posixpath
import shlex
from pathlib import Path

from huggingface_hub import HfApi, is_offline_mode, try_to_load_from_cache
from huggingface_hub.errors import HTTPError

DONOR_LAYERS = "donor_layers.pt"  # what the paper's author calls the file


def how_to_import(
    source: str | os.PathLike[str],
    subfolder: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> str | None:
    """How to import the pickled donor that a folder, a repo or a path to a file names; `None` when it names none.

    The files of a repo are listed, which takes one request; with `local_files_only` they are looked for in the cache,
    and only by the usual name. Arguments as in transformers.
    """
    source, subfolder = os.fspath(source), subfolder or ""
    files: list[str] = []
    if os.path.isfile(source):
        files, subfolder = [source], ""
    elif os.path.isdir(source):
        paths = (path for pattern in ("*.pt", "*/*.pt") for path in Path(source, subfolder).glob(pattern))
        files = [path.relative_to(source).as_posix() for path in paths]
    elif local_files_only or is_offline_mode():
        name = posixpath.join(subfolder, DONOR_LAYERS)
        files = [name] if isinstance(try_to_load_from_cache(source, name, cache_dir, revision), str) else []
    else:
        with contextlib.suppress(HTTPError):  # what the caller has to say is the better error then
            files = HfApi(token=token).list_repo_files(source, revision=revision)
    pickles = sorted(file for file in files if file.endswith(".pt") and file.startswith(posixpath.join(subfolder, "")))
    return _advice(source, pickles, revision) if pickles else None


def _advice(source: str, pickles: list[str], revision: str | None) -> str:
    folder, file = posixpath.split(pickles[0])
    options = {"subfolder": folder, "filename": "" if file == DONOR_LAYERS else file, "revision": revision or ""}
    if pickles[0] == source:
        options = {}
    elif revision == "main":
        del options["revision"]
    given = {key: str(value) for key, value in options.items() if value}
    python = "".join(f", {key}={value!r}" for key, value in given.items())
    shell = shlex.join([source, "BASE", *(word for key, value in given.items() for word in (f"--{key}", value))])
    return (
        f"{source} names no donor but pickled layers ({', '.join(pickles[:3])}{', …' if len(pickles) > 3 else ''}); "
        f"import them with not_hf.import_checkpoint({source!r}, base{python}), where base is the model they were cut "
        f"from, or on the command line: not-hf import {shell} -o FOLDER"
    )
