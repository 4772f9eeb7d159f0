"""`python -m not_hf.cli`."""

from not_hf.cli import app

app(prog_name="not-hf")
