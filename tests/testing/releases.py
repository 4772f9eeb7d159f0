"""What tests must know of the releases that they run with, the oldest of which `make test-lowest` installs."""

from __future__ import annotations

from importlib.metadata import version

import pytest
from packaging.version import Version

# What pipelines of transformers 5.6 log of any model
_LOGGED = ("The following generation flags are not valid", "Passing `generation_config` together", "Both `max_new_to")


def since(package: str, release: str, reason: str) -> pytest.MarkDecorator:
    """Skip a test with older releases of a package."""
    return pytest.mark.skipif(
        Version(version(package)) < Version(release),
        reason=f"{package} {version(package)}, before {release}: {reason}",
    )


CACHES_TRL = Version(version("trl")) >= Version("1.16")  # whose batches the prefix cache follows

dequantizes_fp8 = since("transformers", "5.22", "it needs Triton to dequantize FP8")


def logged(stderr: str) -> list[str]:
    """The lines that a process logged, but for bars and for what transformers logs of any model."""
    lines = (line for line in stderr.splitlines() if line.strip() and "Loading weights" not in line)
    return [line for line in lines if not any(text in line for text in _LOGGED)]
