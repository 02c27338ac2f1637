"""The innocent client: streams all the time, and knows every token that it must get."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType

from hostile.target import vocab_size
from llmos import Client
from llmos.errors import LlmosError, Overloaded
from llmos.services.executor.fake import fake_token


class Neighbour:
    """`with Neighbour(run_dir) as neighbour:` streams from a thread until the block ends; a stream that has begun is finished."""

    def __init__(self, run_dir: Path, *, tokens: int = 200, first_seed: int = 1) -> None:
        self.streams = self.tokens = self.refusals = 0
        self.failures: list[str] = []
        self.longest_pause_s = 0.0
        self._run_dir = run_dir
        self._length = tokens
        self._seed = first_seed
        self._vocab = vocab_size()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run)

    def __enter__(self) -> Neighbour:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        with Client(self._run_dir) as client:
            while not self._stop.is_set() and len(self.failures) < 20:
                self._seed += 1
                try:
                    self._stream(client, self._seed)
                except Overloaded as error:
                    if error.retry_after_s is None:
                        self.failures.append(f"seed {self._seed}: refused without a hint: {error}")
                    self.refusals += 1
                    self._stop.wait(error.retry_after_s or 0.2)
                except LlmosError as error:
                    self.failures.append(f"seed {self._seed}: {type(error).__name__}: {error}")
                    self._stop.wait(0.2)

    def _stream(self, client: Client, seed: int) -> None:
        prompt = [seed % self._vocab] * (seed % 7 + 1)
        ids: list[int] = []
        last = time.monotonic()
        with client.generate(
            prompt, model="demo", seed=seed, max_tokens=self._length, ignore_eos=True, nice=-20, stream=True
        ) as stream:
            for chunk in stream:
                now = time.monotonic()
                self.longest_pause_s = max(self.longest_pause_s, now - last)
                last = now
                ids += chunk.token_ids
                self.tokens += len(chunk.token_ids)
        right = [fake_token(seed, len(prompt) + place, self._vocab) for place in range(self._length)]
        if ids != right:
            self.failures.append(
                f"seed {seed}: {len(ids)} tokens, not the {len(right)} right ones ({stream.completion.finish_reason})"
            )
        self.streams += 1
