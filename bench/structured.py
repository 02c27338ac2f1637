"""Outputs held to generated JSON schemas: does every finished one validate, and what does a mask cost?

    python bench/structured.py                 # 1,000 schemas on the demonstration model, through the whole daemon
    python bench/structured.py --count 50      # a share of them

The judge is `jsonschema`, with formats checked, of the draft that the schema means. An output that ran into its token limit before it
was complete is counted, not judged. Half of the outputs are greedy, half sampled; some with penalties and `min_tokens`, which must not
matter. A refusal counts as a failure here: every generated schema is meant to be supported.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
from common import machine, versions
from daemon import Daemon
from schemas import LEVELS, make_schema

import llmos
from llmos import AsyncClient, Completion, LlmosError

MODEL = Path(llmos.__file__).parent / "assets" / "demo-model"
PROMPT = "What is the capital of France?"
AT_ONCE = 48


@dataclass
class Tally:
    """What became of the schemas of each level."""

    finished: Counter[int] = field(default_factory=Counter)
    cut: Counter[int] = field(default_factory=Counter)
    wrong: list[dict[str, Any]] = field(default_factory=list)
    output_tokens: int = 0

    def judge(self, number: int, completion: Completion | LlmosError) -> None:
        level, schema = make_schema(number)
        if isinstance(completion, LlmosError):
            self.wrong.append({"schema": number, "problem": str(completion)})
            return
        self.output_tokens += len(completion.token_ids)
        if completion.finish_reason == "length":
            self.cut[level] += 1
            return
        self.finished[level] += 1
        try:
            jsonschema.validate(
                json.loads(completion.text), schema, cls=jsonschema.Draft202012Validator,
                format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER,
            )  # fmt: skip
        except (ValueError, jsonschema.ValidationError) as error:
            problem = str(error).split("\n", 1)[0]
            self.wrong.append({"schema": number, "text": completion.text, "problem": problem})


def sampling(number: int) -> dict[str, Any]:
    """Settings that must not matter for what is valid."""
    found: dict[str, Any] = {"seed": number, "temperature": 0.0 if number % 2 else 1.0}
    if number % 5 == 0:
        found |= {"presence_penalty": 1.0, "repetition_penalty": 1.3}
    if number % 7 == 0:
        found |= {"min_tokens": 30}
    if number % 11 == 0:
        found |= {"top_k": 20, "top_p": 0.9}
    return found


async def run_schemas(client: AsyncClient, numbers: range, max_tokens: int) -> Tally:
    tally = Tally()
    gate = asyncio.Semaphore(AT_ONCE)

    async def one(number: int) -> None:
        answer: Completion | LlmosError
        async with gate:
            try:
                schema = make_schema(number)[1]
                prompt = [{"role": "user", "content": PROMPT}]
                options = sampling(number)
                answer = await client.generate(prompt, json_schema=schema, max_tokens=max_tokens, **options)
            except LlmosError as error:
                answer = error
        tally.judge(number, answer)

    await asyncio.gather(*(one(number) for number in numbers))
    return tally


async def measure(run_dir: Path, count: int, max_tokens: int) -> tuple[Tally, float]:
    async with AsyncClient(run_dir) as client:
        started = time.perf_counter()
        return await run_schemas(client, range(count), max_tokens), time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--max-tokens", type=int, default=300)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    facts: dict[str, Any] = {"machine": machine(), "versions": versions(), "schemas": arguments.count}
    with Daemon(MODEL, threads=1) as daemon:
        tally, seconds = asyncio.run(measure(daemon.run_dir, arguments.count, arguments.max_tokens))
    facts |= {
        "finished_and_valid_by_level": [tally.finished[level] for level in range(1, LEVELS + 1)],
        "cut_at_max_tokens_by_level": [tally.cut[level] for level in range(1, LEVELS + 1)],
        "wrong": tally.wrong,
        "output_tokens": tally.output_tokens,
        "seconds": round(seconds, 1),
    }
    path = arguments.out or Path(__file__).parent / "results" / f"structured-{facts['machine']['date'][:10]}.json"
    path.write_text(json.dumps(facts, indent=1, ensure_ascii=False) + "\n")
    print(json.dumps({name: facts[name] for name in facts if name not in ("machine", "versions")}, indent=1))
    print(f"written to {path}")
    if tally.wrong:
        sys.exit(1)


if __name__ == "__main__":
    main()
