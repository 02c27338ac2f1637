"""The load client against a stub: what it asks for, what it measures, and that short streams are refused."""

from __future__ import annotations

import asyncio

import pytest
from load import StreamTimes, run_load

from llmos.client.types import Chunk


class StubClient:
    """Streams `sizes` tokens per chunk to everybody and remembers what was asked."""

    def __init__(self, sizes):
        self.sizes = sizes
        self.asked = []

    async def generate(self, prompt, **options):
        self.asked.append((prompt, options))
        offset = 0
        for size in self.sizes:
            await asyncio.sleep(0)
            yield Chunk("", tuple(range(offset, offset + size)), offset)
            offset += size
        yield Chunk("rest of the text", (), offset)


def test_counts_all_tokens_and_asks_for_exact_lengths():
    client = StubClient([1, 2, 3])
    result = asyncio.run(run_load(client, [[5, 6], [7]], 6))
    assert (result.streams, result.output_tokens) == (2, 12)
    assert result.tokens_per_s == 12 / result.seconds > 0
    assert result.ttft_s[0] <= result.ttft_s[1] <= result.seconds
    assert [prompt for prompt, _ in client.asked] == [[5, 6], [7]]
    for _, options in client.asked:
        params = options["params"]
        assert options["stream"] is True
        assert (params.max_tokens, params.min_tokens, params.ignore_eos, params.temperature) == (6, 6, True, 0.0)


def test_a_stream_of_the_wrong_length_is_an_error():
    with pytest.raises(RuntimeError, match="a stream ended after 3 of 4 tokens"):
        asyncio.run(run_load(StubClient([1, 2]), [[1]], 4))


def test_tokens_of_one_chunk_share_its_gap():
    times = StreamTimes(started=10.0)
    times.arrived((4,), 11.0)
    times.arrived((), 11.5)
    times.arrived((5, 6), 13.0)
    times.arrived((7,), 13.25)
    assert (times.first, times.last) == (11.0, 13.25)
    assert times.gaps == [1.0, 1.0, 0.25]
    assert times.tokens == [4, 5, 6, 7]
