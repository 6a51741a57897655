"""Names of KV pages: a hash over all tokens up to a page's end, so that equal prefixes have equal names.

Owns the names only; which page is where is the pool's account. A sequence only ever grows, so its names are computed
once, page by page.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b


class PageNames:
    """The names of one growing sequence's full pages."""

    def __init__(self, page_size_tokens: int, salt: str | None = None) -> None:
        self._page_size_tokens = page_size_tokens
        self._parent = blake2b((salt or "").encode(), digest_size=8).digest()
        self._names: list[int] = []

    def of(self, token_ids: Sequence[int]) -> list[int]:
        """Names of the full pages of `token_ids`, which begins as every sequence given before, or is its beginning."""
        page = self._page_size_tokens
        count = len(token_ids) // page
        for start in range(len(self._names) * page, count * page, page):
            content = b"".join(t.to_bytes(8, "little") for t in token_ids[start : start + page])
            self._parent = blake2b(self._parent + content, digest_size=8).digest()
            self._names.append(int.from_bytes(self._parent, "little", signed=True))
        return self._names[:count]


def page_names(token_ids: Sequence[int], page_size_tokens: int, salt: str | None = None) -> list[int]:
    """Names of the full pages of a sequence; each depends on all tokens before its end and on the salt."""
    return PageNames(page_size_tokens, salt).of(token_ids)
