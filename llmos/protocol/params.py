"""`SamplingParams`: how the next token is chosen. One struct from the SDK to the executor.

Invariant: `check()` is called by the SDK, by the gateway and again by the microkernel; what passes it can be executed.
"""

from __future__ import annotations

import math

import msgspec

from llmos.errors import InvalidRequest
from llmos.protocol import limits

GRAMMAR_KINDS = ("json_schema", "json_object", "regex", "choice", "lark", "gbnf")
NORMAL_KINDS = frozenset({"json_schema", "regex", "lark"})  # what a tokenizer service makes of them all


class Grammar(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True):
    """What the output has to look like, as data. docs/structured.md has the rules.

    Attributes:
        kind: json_schema, json_object, regex, choice, lark or gbnf.
        text: the schema as JSON text, the regular expression, a JSON array of texts for `choice`, the grammar; "" for json_object.
    """

    kind: str
    text: str = ""

    def check(self, field: str = "grammar") -> None:
        """Kind and size. Whether it has a meaning only a tokenizer service knows."""
        if self.kind not in GRAMMAR_KINDS:
            known = ", ".join(GRAMMAR_KINDS)
            raise InvalidRequest(f"{field}: kind {self.kind[:32]!r} is not one of {known}", field=field)
        limit = limits.MAX_REGEX_BYTES if self.kind == "regex" else limits.MAX_GRAMMAR_BYTES
        size = len(self.text.encode("utf-8", "surrogatepass"))
        if size > limit:
            raise InvalidRequest(f"{field}: {size} bytes of {self.kind}, the limit is {limit}", field=field)


class SamplingParams(msgspec.Struct, array_like=True, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Sampling settings. `None` means: the model's own generation defaults, else the neutral value.

    Attributes:
        temperature: 0 = greedy; otherwise logits are divided by it.
        top_k: keep the k most likely tokens (0 = all).
        top_p: keep the smallest set whose probability reaches top_p (Holtzman et al. 2020, "nucleus").
        min_p: drop tokens less likely than min_p x the most likely one (Nguyen et al. 2024).
        repetition_penalty: divide positive and multiply negative logits of tokens seen in prompt or output (Keskar et al. 2019).
        presence_penalty, frequency_penalty: subtracted from logits of output tokens, once or per occurrence.
        logit_bias: (token id, added value) pairs.
        seed: noise is a hash of (seed, position, token id); None lets the microkernel draw one.
        max_tokens: most tokens to generate; None = to the end of the context.
        min_tokens: stop tokens are impossible before this many.
        stop: strings that end the text (removed from it). stop_token_ids: tokens that end the sequence.
        ignore_eos: the model's own end-of-sequence tokens do not end the sequence.
        logprobs: report the chosen token's log-probability and those of this many best ones (0 = chosen only, None = off).
        prompt_logprobs: the same for every given token but the first; only then may max_tokens be 0 (nothing but scoring).
        grammar: the only outputs that are possible. It wins over `min_tokens`: a complete output ends.
    """

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    seed: int | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    grammar: Grammar | None = None

    @property
    def least_output(self) -> int:
        """A stop token counts only after so many tokens."""
        return self.min_tokens if self.grammar is None else 0

    def check(self) -> None:
        """Raise `InvalidRequest` naming the first field that is out of range."""
        _in_range("temperature", self.temperature, 0.0, limits.MAX_TEMPERATURE)
        _in_range("top_k", self.top_k, 0, 2**31 - 1)
        _in_range("top_p", self.top_p, 0.0, 1.0, low_open=True)
        _in_range("min_p", self.min_p, 0.0, 1.0)
        _in_range("repetition_penalty", self.repetition_penalty, 0.0, limits.MAX_REPETITION_PENALTY, low_open=True)
        _in_range("presence_penalty", self.presence_penalty, -limits.MAX_PENALTY_ABS, limits.MAX_PENALTY_ABS)
        _in_range("frequency_penalty", self.frequency_penalty, -limits.MAX_PENALTY_ABS, limits.MAX_PENALTY_ABS)
        _in_range("seed", self.seed, 0, 2**63 - 1)
        _in_range("max_tokens", self.max_tokens, int(self.prompt_logprobs is None), limits.MAX_TOKENS)
        _in_range("min_tokens", self.min_tokens, 0, limits.MAX_TOKENS)
        _in_range("logprobs", self.logprobs, 0, limits.MAX_LOGPROBS)
        _in_range("prompt_logprobs", self.prompt_logprobs, 0, limits.MAX_LOGPROBS)
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidRequest(
                f"min_tokens ({self.min_tokens}) is above max_tokens ({self.max_tokens})", field="min_tokens"
            )
        self._check_lists()
        if self.grammar is not None:
            self.grammar.check()
            if self.ignore_eos:
                raise InvalidRequest("ignore_eos: an output with a grammar has to end with it", field="ignore_eos")

    def _check_lists(self) -> None:
        _count("stop", len(self.stop), limits.MAX_STOP_STRINGS)
        for text in self.stop:
            if not text or len(text) > limits.MAX_STOP_STRING_CHARS:
                raise InvalidRequest(
                    f"stop: each string needs 1 to {limits.MAX_STOP_STRING_CHARS} characters", field="stop"
                )
        _count("stop_token_ids", len(self.stop_token_ids), limits.MAX_STOP_TOKEN_IDS)
        for token in self.stop_token_ids:
            _in_range("stop_token_ids", token, 0, 2**31 - 1)
        _count("logit_bias", len(self.logit_bias), limits.MAX_LOGIT_BIAS)
        for token, bias in self.logit_bias:
            _in_range("logit_bias", token, 0, 2**31 - 1)
            _in_range("logit_bias", bias, -limits.MAX_LOGIT_BIAS_ABS, limits.MAX_LOGIT_BIAS_ABS)


def _count(field: str, found: int, limit: int) -> None:
    if found > limit:
        raise InvalidRequest(f"{field}: {found} entries, the limit is {limit}", field=field)


def _in_range(field: str, value: float | None, low: float, high: float, *, low_open: bool = False) -> None:
    if value is None:
        return
    if not math.isfinite(value) or value > high or value < low or (low_open and value == low):
        bracket = "(" if low_open else "["
        raise InvalidRequest(f"{field}: {value} is outside {bracket}{low}, {high}]", field=field)
