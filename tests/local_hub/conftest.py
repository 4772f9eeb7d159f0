"""A repo of the test's own."""

import pytest
from huggingface_hub import (
    HfApi,
)


@pytest.fixture
def repo(api: HfApi, request: pytest.FixtureRequest) -> str:
    """A repository of the test's own."""
    return api.create_repo(f"me/{request.node.name}").repo_id
