"""Beam search with forks: `python examples/beam_search.py "The capital of"`.

A beam is an open sequence. Each round every beam is asked for its likeliest next tokens by a fork that generates one token and is thrown
away; the best continuations are forks of their beams with one token appended. All beams share the pages of what they have in common, so
nothing is computed twice and nothing is copied but the one page that a beam writes into.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llmos import Client

if TYPE_CHECKING:
    from llmos import Sequence


@dataclass
class Beam:
    """`logprob`: of all its tokens together."""

    sequence: Sequence
    token_ids: tuple[int, ...]
    logprob: float


def next_tokens(beam: Beam, count: int) -> list[tuple[float, int]]:
    """(log-probability of the whole, token) of the beam's likeliest continuations."""
    [probe] = beam.sequence.fork()
    with probe:
        answer = probe.generate(max_tokens=1, temperature=0.0, logprobs=count, ignore_eos=True)
    assert answer.logprobs is not None
    best = answer.logprobs[0]
    return [(beam.logprob + logprob, token) for token, logprob in zip(best.top_ids, best.top_logprobs)]


def beam_search(client: Client, prompt: str | list[int], width: int, length: int) -> list[Beam]:
    """The `width` best continuations of `length` tokens that beam search finds, best first. The caller closes their sequences."""
    beams = [Beam(client.spawn(prompt), (), 0.0)]
    for _ in range(length):
        found = [(total, token, beam) for beam in beams for total, token in next_tokens(beam, 2 * width)]
        found.sort(key=lambda candidate: -candidate[0])
        chosen = []
        for total, token, beam in found[:width]:
            [child] = beam.sequence.fork()
            child.append([token])
            chosen.append(Beam(child, (*beam.token_ids, token), total))
        for beam in beams:
            beam.sequence.close()
        beams = chosen
    return beams


def main() -> None:
    prompt = sys.argv[1] if len(sys.argv) > 1 else "The capital of"
    with Client() as client:
        for beam in beam_search(client, prompt, width=4, length=12):
            pieces = "".join(client.tokenize(prompt).pieces)
            sys.stdout.write(f"{beam.logprob:8.3f}  {pieces!r} + {beam.token_ids}\n")
            beam.sequence.close()


if __name__ == "__main__":
    main()
