"""One output held to its grammar: a pure fold of (grammar, tokens), so that it can be built anew anywhere, at any time.

States: open -> ended (a stop token came; whatever follows is not part of the output) | failed (the parser gave up, or a token came that
the grammar does not allow; `problem` says why).
Masks are int32 words, 32 tokens each, lowest bit first, as llguidance and the sampling kernels have them.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from llmos.protocol.params import Grammar
from llmos.services.grammar.compiled import compiled

Words = npt.NDArray[np.int32]

# What a parser may spend: on one token a few tens of milliseconds at most, and some 40 MB in all.
LIMITS = LLParserLimits(
    max_items_in_row=1000,
    initial_lexer_fuel=500_000,
    step_lexer_fuel=100_000,
    step_max_items=20_000,
    max_lexer_states=20_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Follower:
    """`grammar` is normal (compile.py). `stops`: tokens that may come when the output is complete, and only then unless the grammar
    has them, too."""

    def __init__(self, vocabulary: LLTokenizer, grammar: Grammar, stops: Collection[int]) -> None:
        self.matcher = LLMatcher(vocabulary, compiled(grammar), limits=LIMITS, log_level=0)
        self.has_ended = False
        self._stops = frozenset(stops)
        self._ends = frozenset(vocabulary.eos_tokens)
        self._followed = 0

    @property
    def problem(self) -> str:
        """Why it failed; "" if it did not."""
        return self.matcher.get_error() if self.matcher.is_error() else ""

    def follow(self, output: Sequence[int]) -> None:
        """`output`: all tokens of the output so far, of which the first were followed before."""
        fresh = output[self._followed :]
        self._followed = len(output)
        for place, token in enumerate(fresh):
            if token in self._stops:
                self.has_ended = True
                fresh = fresh[:place]
                break
        if len(fresh) and not self.matcher.is_error():
            self.matcher.consume_tokens([int(token) for token in fresh])

    def fill(self, mask: Words) -> bool:
        """Set `mask` to what may come next. False: nothing may, or it can not be told."""
        if self.has_ended:
            mask[:] = -1  # the step that runs ahead of the end computes a token that nobody wants
            return True
        words = np.frombuffer(self.matcher.compute_bitmask(), dtype="<i4")
        mask[:] = 0
        size = min(mask.size, words.size)
        mask[:size] = words[:size]
        for token in self._ends:
            set_bit(mask, token, False)
        if self.matcher.is_error():
            return False
        if self.matcher.is_accepting():
            for token in self._stops:
                set_bit(mask, token, True)
        return bool(mask.any())

    def without_stops(self, mask: Words) -> Words:
        """The mask less stop tokens, if that leaves anything: before `min_tokens` an output ends only if it has to."""
        rest = mask.copy()
        for token in self._stops:
            set_bit(rest, token, False)
        return rest if rest.any() else mask


def set_bit(mask: Words, token: int, value: bool) -> None:
    """Beyond the vocabulary there is nothing to set."""
    word, bit = divmod(token, 32)
    if word < mask.size:
        flag = np.array(1 << bit, dtype=np.uint32).view(np.int32)
        mask[word] = mask[word] | flag if value else mask[word] & ~flag


def num_words(vocab_size: int) -> int:
    return (vocab_size + 31) // 32
