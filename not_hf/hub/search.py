"""`list_donors`: donors on the Hub, found by the tags of their cards."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from huggingface_hub import HfApi
from huggingface_hub.hf_api import ExpandModelProperty_T, ModelInfo

from not_hf.cards.common import ADAPTER_TAG, DONOR_TAG, METHOD_TAGS
from not_hf.errors import reaching_hub, require_plain_token

# Fields of each repo that the listing request asks for
_FIELDS: list[ExpandModelProperty_T] = ["downloads", "gated", "lastModified", "likes", "private", "sha", "tags"]


@dataclass(frozen=True)
class DonorInfo:
    """A donor repo, as the Hub lists it.

    Args:
        id: Hub ID.
        base_model: Hub ID of the model it was cut from; `None` if the card names none.
        downloads: In the last 30 days.
        likes: Number of likes.
        last_modified: When the last commit was made.
        private: Visible to its owner only.
        gated: `"auto"` or `"manual"` if access must be requested.
        tags: All tags of the repo.
        sha: The last commit.
    """

    id: str
    base_model: str | None
    downloads: int | None
    likes: int | None
    last_modified: datetime | None
    private: bool | None
    gated: str | bool | None
    tags: tuple[str, ...]
    sha: str | None


def list_donors(
    base_model: str | None = None,
    author: str | None = None,
    search: str | None = None,
    limit: int | None = None,
    token: bool | str | None = None,
) -> list[DonorInfo]:
    """List donors on the Hub, the most downloaded first; an empty list if there are none.

    Args:
        base_model: Hub ID of the model they were cut from.
        author: User or organization that owns them.
        search: Words in their IDs.
        limit: Maximum number of donors.
        token: Hub token, for private donors; `False`: none.

    Raises:
        OSError: The Hub cannot be reached, or refuses the token.

    Examples:
        >>> from not_hf import list_donors
        >>> donors = list_donors(base_model="openai-community/gpt2", limit=5)
        >>> isinstance(donors, list) and all("not-hf" in donor.tags for donor in donors)
        True
    """
    wanted = [DONOR_TAG, METHOD_TAGS[0], *([f"{ADAPTER_TAG}{base_model}"] if base_model else [])]
    require_plain_token(token)
    api = HfApi(token=token)
    found = api.list_models(filter=wanted, author=author, search=search, sort="downloads", limit=limit, expand=_FIELDS)
    with reaching_hub("donors cannot be listed"):
        return [_described(model) for model in found]


def _described(model: ModelInfo) -> DonorInfo:
    tags = tuple(model.tags or ())
    bases = (tag.removeprefix(ADAPTER_TAG) for tag in tags if tag.startswith(ADAPTER_TAG))
    return DonorInfo(
        id=model.id,
        base_model=next(bases, None),
        downloads=model.downloads,
        likes=model.likes,
        last_modified=model.last_modified,
        private=model.private,
        gated=model.gated,
        tags=tags,
        sha=model.sha,
    )
