"""The right answers of a real model: talks of several turns, recorded one after another while nothing is broken."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

from chaos.material import TURNS
from llmos import AsyncClient

OPENINGS = (
    "Once upon a time", "What is the capital of France?", "12 + 7 =", "The old man looked at the sea and",
    "A list of animals:", "Once there was a little fox who", "How do you make tea?", "In the morning the sun",
)  # fmt: skip
GOING_ON = (" And then", " But the next day", " Why?", "\n\nAnother one:")


async def record(run_dir: Path, model: str, path: Path, seed: int) -> None:
    """Write the file that answers.RecordedAnswers reads."""
    chance = random.Random(seed)
    async with AsyncClient(run_dir, model) as client:
        talks = {f"talk {number}": await _talk(client, opening, chance) for number, opening in enumerate(OPENINGS)}
    path.write_text(json.dumps(talks))


async def _talk(client: AsyncClient, opening: str, chance: random.Random) -> list[dict[str, Any]]:
    turns: list[dict[str, Any]] = []
    async with await client.spawn(opening) as seq:
        for number in range(TURNS):
            said = opening if number == 0 else chance.choice(GOING_ON)
            length = None if number == 0 else await seq.append(said)
            count = chance.randint(24, 96)
            output = await seq.generate(temperature=0.0, max_tokens=count, ignore_eos=True)
            said_and_done = {"append": said, "length": length, "max_tokens": count}
            turns.append(said_and_done | {"ids": list(output.token_ids), "text": output.text})
    return turns
