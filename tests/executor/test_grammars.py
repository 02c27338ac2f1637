"""Rows held to grammars on the CPU backend: whatever happens to them, the same tokens, and only theirs when a grammar goes wrong."""

from __future__ import annotations

import json
import threading
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from demo_grammars import DEMO, compiled
from plan_driver import PlanDriver
from tokenizers import Tokenizer

from llmos.codes import FinishReason
from llmos.config import ModelConfig
from llmos.protocol.params import Grammar
from llmos.services.executor import grammars
from llmos.services.executor.backend import Limits
from llmos.services.executor.cpu import CpuBackend

TOKENIZER = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
PROMPT = TOKENIZER.encode("What is the capital of France?").ids
END = 1
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 6},
        "size": {"type": "integer", "minimum": 10, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "green"]}, "minItems": 2, "maxItems": 2},
    },
    "required": ["name", "size", "tags"],
    "additionalProperties": False,
}
JSON = compiled("json_schema", json.dumps(SCHEMA))


@pytest.fixture(scope="module")
def backend() -> CpuBackend:
    model = ModelConfig("demo", str(DEMO), dtype="float32", page_size=16, num_pages=200, threads=1)
    return CpuBackend.open(model, Path(DEMO), Limits(16, 512), lambda: None)


@pytest.fixture
def driver(backend: CpuBackend) -> PlanDriver:
    backend.reset()
    backend.grammars = grammars.Grammars.of_model(DEMO, 2048)
    return PlanDriver(backend)


def held(driver: PlanDriver, grammar: Grammar | None = JSON, *, max_tokens: int = 60, **params):
    settings = {"temperature": 1.0, "stop_token_ids": (END,), "grammar": grammar}
    return driver.add(PROMPT, max_tokens, **settings | params)


def text(seq) -> str:
    """The output up to its end."""
    output = seq.output[: seq.output.index(END)] if END in seq.output else seq.output
    return TOKENIZER.decode(output, skip_special_tokens=False)


def test_every_output_validates_whatever_else_is_asked_for(driver):
    seqs = [
        held(driver, seed=1),
        held(driver, temperature=0.0),
        held(driver, seed=2, presence_penalty=2.0, frequency_penalty=2.0, repetition_penalty=1.5),
        held(driver, seed=3, min_tokens=40),
        held(driver, seed=4, top_k=5, top_p=0.8, min_p=0.01, logprobs=2),
        held(driver, seed=5, logit_bias=((END, 50.0),)),
    ]
    free = held(driver, None, seed=1)
    driver.run()
    for seq in seqs:
        assert END in seq.output, text(seq)
        jsonschema.validate(json.loads(text(seq)), SCHEMA)
    assert len(seqs[4].logprobs) == len(seqs[4].output)
    assert "{" not in text(free)


def test_the_same_tokens_alone_in_company_preempted_swapped_and_forked(driver, backend):
    alone = held(driver, seed=9)
    driver.run()
    expected = alone.output
    assert END in expected
    for disturb_at in (1, 9):
        seq, others = held(driver, seed=9), [held(driver, seed=20 + n) for n in range(1)]
        for _ in range(disturb_at):
            driver.step()
        driver.release(seq)
        driver.release(others[0])
        driver.run()
        assert seq.output == expected
    parent = held(driver, seed=9)
    for _ in range(8):
        driver.step()
    settings = {"temperature": 1.0, "stop_token_ids": (END,), "grammar": JSON}
    same, other = driver.fork(parent, 60, seed=9, **settings), driver.fork(parent, 60, seed=10, **settings)
    driver.run()
    assert parent.output == same.output == expected
    assert other.output[:8] == expected[:8]
    jsonschema.validate(json.loads(text(other)), SCHEMA)


def test_another_executor_goes_on_with_the_same_tokens(driver):
    whole = held(driver, seed=5)
    driver.run()
    for length in (0, len(whole.output) // 2):
        driver.backend.grammars = grammars.Grammars.of_model(DEMO, 2048)
        resumed = held(driver, seed=5)
        resumed.tokens += whole.output[:length]
        driver.run()
        assert resumed.output == whole.output


def test_a_row_that_is_given_to_another_grammar_follows_that(driver):
    first = held(driver, compiled("regex", "[0-9]{4}"), seed=1, max_tokens=3)
    driver.run()
    second = held(driver, compiled("choice", '["red", "green"]'), seed=1)
    driver.run()
    assert len(first.output) == 3
    assert text(second) in ("red", "green")


def test_a_grammar_that_fails_ends_its_row_alone(driver):
    wrong = held(driver, Grammar("lark", "start: nothing_like_it"), seed=1)
    stuck = held(driver, compiled("regex", "[0-9]{4}"), seed=1)
    stuck.tokens += TOKENIZER.encode("not a digit", add_special_tokens=False).ids
    good, free = held(driver, seed=1), held(driver, None, seed=1)
    driver.run()
    assert wrong.failed == stuck.failed == FinishReason.GRAMMAR_FAILED
    assert wrong.output == []
    assert good.failed is None
    assert free.failed is None
    jsonschema.validate(json.loads(text(good)), SCHEMA)


def test_a_grammar_over_which_the_library_breaks_down_ends_its_row_alone(driver, monkeypatch):
    original = grammars._Row.next

    def break_down(self, output):
        if self._params.seed == 666:
            raise BaseException("PanicException")  # what a panic in Rust becomes
        return original(self, output)

    monkeypatch.setattr(grammars._Row, "next", break_down)
    bad, good = held(driver, seed=666, max_tokens=3), held(driver, seed=1, max_tokens=3)
    driver.run()
    assert (bad.failed, bad.output) == (FinishReason.GRAMMAR_FAILED, [])
    assert good.failed is None


def test_a_grammar_that_hangs_is_given_up_and_others_go_on(driver, monkeypatch):
    hanging, released = threading.Event(), threading.Event()
    original = grammars._Row.next

    def maybe_hang(self, output):
        if self._params.seed == 666 and len(output) == 3:
            hanging.set()
            released.wait()
        return original(self, output)

    monkeypatch.setattr(grammars, "PATIENCE_S", 0.05)
    monkeypatch.setattr(grammars._Row, "next", maybe_hang)
    try:
        bad, good = held(driver, seed=666), held(driver, seed=1)
        driver.run()
    finally:
        released.set()
    assert hanging.is_set()
    assert bad.failed == FinishReason.GRAMMAR_FAILED
    assert len(bad.output) == 3
    assert good.failed in (None, FinishReason.GRAMMAR_FAILED)  # 50 ms may be too little for it, too


def test_without_grammars_nothing_is_loaded(driver):
    def load():
        raise AssertionError("nobody asked for a vocabulary")

    driver.backend.grammars = grammars.Grammars(load, 2048)
    seq = held(driver, None, max_tokens=4)
    driver.run()
    assert len(seq.output) == 4
    assert driver.backend.grammars._threads is None


def test_before_min_tokens_an_output_ends_only_if_it_has_to(driver):
    long = held(driver, compiled("regex", "[a-z]{1,30}"), temperature=0.0, logit_bias=((END, 100.0),), min_tokens=6)
    short = held(driver, compiled("regex", "[a-z]{1,30}"), temperature=0.0, logit_bias=((END, 100.0),))
    has_to = held(driver, compiled("regex", "[0-9]{2}"), min_tokens=30)
    driver.run()
    assert long.output.index(END) == 6
    assert short.output.index(END) == 1
    assert has_to.output.index(END) <= 2


def test_masks_in_one_piece_are_the_masks(driver):
    first, second, _ = held(driver, seed=1), held(driver, compiled("regex", "[0-9]{4}")), held(driver, None)
    driver.step()
    table = driver.backend.rows
    pending = driver.backend.grammars.begin(np.array([2, first.row, second.row]), table)
    masks = pending.wait()
    rows, words = masks.stacked()
    assert sorted(rows) == sorted([first.row, second.row])
    assert all((words[place] == masks.of(row)).all() for place, row in enumerate(rows))
    assert words.shape == (2, 64)
