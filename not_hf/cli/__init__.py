"""The command line, `not-hf`: one module per command."""

from not_hf.cli import (  # noqa: F401 (importing a command registers it)
    check,
    compare,
    eval,
    extract,
    generate,
    import_,
    inspect,
    merge,
    probe,
    push,
    run,
    search,
    serve,
    sweep,
    train,
    transplant,
)
from not_hf.cli.app import app

__all__ = ["app"]

_ORDER = (  # in --help: that of a first use
    *("extract", "import", "train", "eval", "sweep", "compare", "probe", "generate", "inspect", "check"),
    *("push", "search", "transplant", "merge", "serve", "run"),
)
app.registered_commands.sort(key=lambda info: _ORDER.index(str(info.name)))
