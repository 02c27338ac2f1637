"""A request that kills the executor each time it runs: it fails alone, everybody else gets the right answer."""

from __future__ import annotations

import asyncio

import pytest
from daemon import FAKE, running

from llmos import AsyncClient, SequenceFailed
from llmos.services.executor.fake import POISON_VARIABLE, fake_token

pytestmark = pytest.mark.slow
POISON = 1999


def test_only_the_culprit_fails(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(POISON_VARIABLE, str(POISON))
    monkeypatch.setenv("LLMOS_FAKE_STEP_MS", "20")

    async def scenario(run_dir: object) -> list[object]:
        async with AsyncClient(run_dir) as client:
            calls = [
                client.generate([index + 1, 2, 3], max_tokens=60, seed=seed, ignore_eos=True)
                for index, seed in enumerate(SEEDS)
            ]
            calls.insert(1, client.generate([1, POISON, 3], max_tokens=60, seed=5, ignore_eos=True))
            return list(await asyncio.gather(*calls, return_exceptions=True))

    with running(FAKE) as daemon:
        bad, *good = _sorted(asyncio.run(scenario(daemon.run_dir)))
        deaths = daemon.log.count("is down: exited with code 70")
    assert isinstance(bad, SequenceFailed)
    assert "poisoned" in str(bad)
    assert {answer.token_ids for answer in good} == {expected(seed) for seed in SEEDS}
    assert 2 <= deaths <= 6  # log2 of four in flight and three, and one more if not all were there at the first


def expected(seed: int) -> tuple[int, ...]:
    return tuple(fake_token(seed, 3 + index, 2048) for index in range(60))


def _clean_seeds() -> list[int]:
    """Seeds whose answers do not happen to hold the poisonous token."""
    return [seed for seed in range(100) if POISON not in expected(seed)][:3]


SEEDS = _clean_seeds()


def _sorted(answers: list[object]) -> list[object]:
    return sorted(answers, key=lambda answer: not isinstance(answer, Exception))
