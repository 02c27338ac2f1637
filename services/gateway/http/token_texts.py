"""What single tokens look like, for log-probabilities: asked of the tokenizer once, then kept.

The table of a model has at most as many entries as its vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable

from llmos.protocol.codec import pack_i32
from llmos.protocol.messages import Detokenize, Detokenized, TokenLogprobs
from llmos.services.gateway.http.sessions import Session


class TokenTexts:
    """Bytes of tokens by model and id."""

    def __init__(self) -> None:
        self._known: dict[str, dict[int, bytes]] = {}

    async def learn(self, session: Session, model: str, ids: Iterable[int]) -> dict[int, bytes]:
        """A table that has these."""
        table = self._known.setdefault(model, {})
        missing = sorted(set(ids) - table.keys())
        if missing:
            found = await session.ask(lambda req: Detokenize(req, model, pack_i32(missing)), Detokenized)
            table.update(zip(missing, found.pieces))
        return table


def ids_in(ids: Iterable[int], logprobs: Iterable[TokenLogprobs | None]) -> set[int]:
    """All tokens that are spoken of."""
    return {*ids, *(top for one in logprobs if one is not None for top in one.top_ids)}


def shown(raw: bytes) -> str:
    return raw.decode(errors="replace")
