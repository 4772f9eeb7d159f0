"""What the tests share: tiny models, donors with tensors of their own, and ways to run commands and processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
EXAMPLES = ROOT / "examples"


def tree(folder: Path) -> dict[str, bytes]:
    """Every file of a folder, by its path in it."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
