"""The load client: N streams at once over `llmos.AsyncClient`, exact lengths, and what their users would feel."""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import Any, Protocol

from common import percentile

from llmos import SamplingParams


class StreamingClient(Protocol):
    """What the load needs of `llmos.AsyncClient`."""

    def generate(self, prompt: list[int], **options: Any) -> Any: ...


@dataclass
class StreamTimes:
    """When the tokens of one stream arrived. `gaps`: seconds a token after the first one."""

    started: float
    first: float = 0.0
    last: float = 0.0
    tokens: list[int] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)

    def arrived(self, token_ids: tuple[int, ...], now: float) -> None:
        """Tokens that come together share the time since the chunk before."""
        if not token_ids:
            return
        if not self.tokens:
            self.first = now
        else:
            self.gaps.extend([(now - self.last) / len(token_ids)] * len(token_ids))
        self.last = now
        self.tokens.extend(token_ids)


@dataclass(frozen=True)
class LoadResult:
    """All streams of one run."""

    streams: int
    output_tokens: int
    seconds: float
    ttft_s: tuple[float, float]
    gap_s: tuple[float, float]

    @property
    def tokens_per_s(self) -> float:
        return self.output_tokens / self.seconds


async def run_load(client: StreamingClient, prompts: list[list[int]], output_tokens: int) -> LoadResult:
    """Start all streams at once and read each to its end."""
    params = SamplingParams(temperature=0.0, max_tokens=output_tokens, min_tokens=output_tokens, ignore_eos=True)
    started = time.perf_counter()
    streams = await asyncio.gather(*(_one_stream(client, prompt, params) for prompt in prompts))
    for stream in streams:
        if len(stream.tokens) != output_tokens:
            raise RuntimeError(f"a stream ended after {len(stream.tokens)} of {output_tokens} tokens")
    ttft = [stream.first - stream.started for stream in streams]
    gaps = [gap for stream in streams for gap in stream.gaps]
    return LoadResult(
        streams=len(streams),
        output_tokens=output_tokens * len(streams),
        seconds=max(stream.last for stream in streams) - started,
        ttft_s=(percentile(ttft, 0.5), percentile(ttft, 0.99)),
        gap_s=(percentile(gaps, 0.5), percentile(gaps, 0.99)),
    )


async def _one_stream(client: StreamingClient, prompt: list[int], params: SamplingParams) -> StreamTimes:
    times = StreamTimes(time.perf_counter())
    async for chunk in client.generate(prompt, stream=True, params=params):
        times.arrived(chunk.token_ids, time.perf_counter())
    return times
