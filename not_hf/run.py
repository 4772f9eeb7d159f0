"""`python -m not_hf.run MODULE [ARGS]`: run the module of another tool with donors registered.

Python imports the package before this file, which registers donors.
"""

from __future__ import annotations

import runpy
import sys

USAGE = "usage: python -m not_hf.run MODULE [ARGS], as in python -m not_hf.run lm_eval --model hf --tasks arc_easy"


def main() -> None:
    """Run the module, as `python -m` does."""
    del sys.argv[0]
    if not sys.argv or sys.argv[0].startswith("-"):
        sys.exit(USAGE)
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
