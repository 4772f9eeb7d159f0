"""`python -m local_hub --root DIR [--port N] [--xet]`: print the endpoint, serve until killed."""

import argparse
import contextlib
import threading
from pathlib import Path

from local_hub import Hub


def main() -> None:
    """Serve one folder in the foreground."""
    parser = argparse.ArgumentParser(
        prog="python -m local_hub", description="Serve a small Hugging Face Hub from a folder."
    )
    parser.add_argument("--root", type=Path, required=True, help="folder that holds the repositories")
    parser.add_argument("--port", type=int, default=0, help="0 picks a free one")
    parser.add_argument("--xet", action="store_true", help="also offer Xet storage")
    args = parser.parse_args()
    with Hub(args.root, xet=args.xet, port=args.port) as hub:
        print(hub.endpoint, flush=True)
        with contextlib.suppress(KeyboardInterrupt):
            threading.Event().wait()


if __name__ == "__main__":
    main()
