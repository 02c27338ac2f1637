"""Log-probabilities of a prompt's tokens as they travel: one record per token, in 4-byte words, little-endian.

    token id (int32), its log-probability (float32), ids of the `top` best (int32[top]), their log-probabilities (float32[top])

A log-probability is that of the token behind all tokens before it. Token 0 has none: NaN, and -1 for ids.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator

from llmos.errors import ProtocolError
from llmos.protocol.messages import TokenLogprobs

_WORD = 4


def record_words(top: int) -> int:
    """Words of one record."""
    return 2 * (1 + top)


def record_bytes(top: int) -> int:
    return _WORD * record_words(top)


def unpack_records(values: bytes, top: int) -> Iterator[tuple[int, TokenLogprobs]]:
    """(token id, log-probabilities) of each record; raises `ProtocolError` if these are not whole records."""
    size = record_bytes(top)
    if len(values) % size:
        raise ProtocolError(f"{len(values)} bytes are not records of {size}", field="values")
    for token, logprob, *best in struct.iter_unpack(f"<if{top}i{top}f", values):
        yield token, TokenLogprobs(logprob, tuple(best[:top]), tuple(best[top:]))
