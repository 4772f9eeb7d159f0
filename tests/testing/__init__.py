"""What the tests share: tiny models, donors with tensors of their own, and ways to run commands and processes."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # of the repository
EXAMPLES = ROOT / "examples"
