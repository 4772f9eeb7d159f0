"""The `not-hf` commands, run inside of the test process, and what errors say."""

from __future__ import annotations

import json

from typer.testing import CliRunner, Result

from not_hf.cli import app


def invoke(*arguments: object) -> Result:
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(argument) for argument in arguments])


def done(*arguments: object) -> dict:
    """What a command that must succeed prints with --json: one document and nothing else."""
    result = invoke(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def failed(*arguments: object) -> str:
    """The one line that a command that must fail says why with; its stdout stays empty."""
    result = invoke(*arguments)
    assert result.exit_code == 1, (result.stdout, result.stderr)
    assert result.stdout == ""
    *before, line = result.stderr.splitlines()
    assert line.startswith("error: "), result.stderr
    assert not [other for other in before if "error" in other.lower() or "Traceback" in other], result.stderr
    return line


def is_one_line(error: BaseException) -> bool:
    """Whether an error says something, in one line that can be read."""
    return "\n" not in str(error) and 10 < len(str(error)) < 800
