"""Prefix cache of one model: finds pages whose content equals the beginning of a new sequence.

A page's key is a chained hash: blake2b-128(previous key, token ids of this page), the first chained to a salt, so equal keys mean
equal token prefixes of equal salts. The salt holds the owner unless sharing is configured: timing must not tell one tenant what
another asked. Only full pages whose tokens are committed are indexed. Invariant: index and page->key map are inverse to each other.
"""

from __future__ import annotations

from array import array
from hashlib import blake2b

_KEY_BYTES = 16


class PrefixCache:
    """Key -> page. Who references a page is the pool's business."""

    def __init__(self, page_size: int) -> None:
        self.page_size = page_size
        self._page_of: dict[bytes, int] = {}
        self._key_of: dict[int, bytes] = {}

    def __len__(self) -> int:
        return len(self._page_of)

    def extend_keys(self, keys: list[bytes], tokens: array[int], num_tokens: int, salt: bytes) -> None:
        """Append the keys of all full pages within the first `num_tokens` tokens that `keys` lacks."""
        for index in range(len(keys), num_tokens // self.page_size):
            previous = keys[-1] if keys else blake2b(salt, digest_size=_KEY_BYTES).digest()
            start = index * self.page_size
            content = tokens[start : start + self.page_size].tobytes()
            keys.append(blake2b(previous + content, digest_size=_KEY_BYTES).digest())

    def match(self, keys: list[bytes]) -> list[int]:
        """Pages of the longest indexed beginning of `keys`."""
        pages = []
        for key in keys:
            page = self._page_of.get(key)
            if page is None:
                break
            pages.append(page)
        return pages

    def insert(self, key: bytes, page: int) -> bool:
        """Index a page; False if the content is indexed already (the older page stays)."""
        if key in self._page_of:
            return False
        assert page not in self._key_of, f"page {page} is indexed under another key"
        self._page_of[key] = page
        self._key_of[page] = key
        return True

    def evict(self, page: int) -> None:
        """Forget a page's content."""
        del self._page_of[self._key_of.pop(page)]
