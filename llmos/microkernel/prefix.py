"""Prefix cache of one model: finds pages whose content equals the beginning of a new sequence.

A page's key is a chained hash: blake2b-128(previous key, token ids of this page), the first chained to a salt, so equal keys mean
equal token prefixes of equal salts. The salt holds the owner unless sharing is configured: timing must not tell one tenant what
another asked. Only full pages whose tokens are committed are indexed. Invariant: index and page->key map are inverse to each other.
"""

from __future__ import annotations

from array import array
from contextlib import suppress
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
        done = len(keys)
        count = num_tokens // self.page_size - done
        if count <= 0:
            return
        previous = keys[-1] if keys else blake2b(salt, digest_size=_KEY_BYTES).digest()
        content = tokens[done * self.page_size : (done + count) * self.page_size].tobytes()
        width = len(content) // count
        for start in range(0, len(content), width):
            previous = blake2b(previous + content[start : start + width], digest_size=_KEY_BYTES).digest()
            keys.append(previous)

    def match(self, keys: list[bytes]) -> list[int]:
        """Pages of the longest indexed beginning of `keys`."""
        pages: list[int] = []
        # `extend` keeps what came before the error: a loop in C, three times as fast as one of the interpreter.
        with suppress(KeyError):
            pages.extend(map(self._page_of.__getitem__, keys))
        return pages

    def insert(self, keys: list[bytes], pages: array[int]) -> list[int]:
        """Index pages. Returns those that are indexed now, without those whose content is indexed already (the older page stays)."""
        added = []
        for key, page in zip(keys, pages):
            if key not in self._page_of:
                assert page not in self._key_of, f"page {page} is indexed under another key"
                self._page_of[key] = page
                self._key_of[page] = key
                added.append(page)
        return added

    def evict(self, page: int) -> None:
        """Forget a page's content."""
        del self._page_of[self._key_of.pop(page)]
