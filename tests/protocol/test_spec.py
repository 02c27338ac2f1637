"""The specification says what the code does.

After a change of messages `python tests/support/spec_text.py` refreshes what is generated in it.
"""

from __future__ import annotations

import re
from enum import IntEnum
from typing import Any

import pytest
import spec_text

from llmos.codes import ErrorCode, FinishReason, SeqState, ServiceState
from llmos.protocol import codec, limits, messages
from llmos.protocol.params import SamplingParams

TEXT = spec_text.PAGE.read_text()


@pytest.mark.parametrize("cls", spec_text.documented(), ids=lambda cls: cls.__name__)
def test_each_message_and_struct_has_one_row_with_its_number_and_fields(cls: Any) -> None:
    assert TEXT.count(spec_text.row_start(cls)) == 1


def test_no_row_documents_a_message_that_does_not_exist() -> None:
    rows = re.findall(r"^\| (\d+) `(\w+)` \| (?:`|none)", TEXT, re.MULTILINE)
    known = {(spec_text.number_of(cls), cls.__name__) for cls in spec_text.structs(messages.Message)}
    assert {(int(number), name) for number, name in rows} == known


@pytest.mark.parametrize(("codes", "heading"), [(ErrorCode, "Error.code"), (FinishReason, "Finished.reason")])
def test_each_code_has_its_row(codes: type[IntEnum], heading: str) -> None:
    table = TEXT.partition(f"| code | `{heading}` |")[2].partition("\n\n")[0]
    rows = re.findall(r"^\| (\d+) \| `(\w+)` \|", table, re.MULTILINE)
    assert [(int(number), name) for number, name in rows] == [(int(code), code.name) for code in codes]


@pytest.mark.parametrize("state", [*SeqState, *ServiceState], ids=lambda state: f"{type(state).__name__}.{state.name}")
def test_each_state_is_named(state: IntEnum) -> None:
    assert f"`{state.name}`" in TEXT.partition("sequence state (")[2].partition("\n\n")[0]


def test_limits_in_the_table_are_the_limits() -> None:
    rows = dict(re.findall(r"^\| `(M(?:AX|IN)_\w+|UNLIMITED)` \| (-?\d+)", TEXT, re.MULTILINE))
    assert {name: int(value) for name, value in rows.items()} == {name: getattr(limits, name) for name in rows}
    assert len(rows) == 18
    for number in (
        limits.MAX_STOP_STRINGS,
        limits.MAX_STOP_STRING_CHARS,
        limits.MAX_LOGIT_BIAS,
        limits.MAX_LOGPROBS,
        limits.MAX_TOKENS,
    ):
        assert str(number) in TEXT.partition("### 4.1")[2].partition("## 5")[0]


@pytest.mark.parametrize("field", SamplingParams.__struct_fields__)
def test_each_sampling_parameter_is_explained(field: str) -> None:
    table = TEXT.partition("### 4.1")[2].partition("## 5")[0]
    assert re.search(rf"^\| [^|]*`{field}`", table, re.MULTILINE)


def test_the_schema_hash_is_todays() -> None:
    assert f"Schema hash of this version: `{codec.SCHEMA_HASH}`" in TEXT, "run python tests/support/spec_text.py"
    assert TEXT.startswith(f"# llmos wire specification, version {codec.PROTOCOL_VERSION}\n")


@pytest.mark.parametrize(("text", "frame"), spec_text.examples(TEXT), ids=lambda value: str(value)[:20])
def test_example_frames_decode_to_what_the_text_says(text: str, frame: bytes) -> None:
    either: codec.Schema[Any] = codec.Schema(messages.ClientToGateway | messages.GatewayToClient)
    assert either.decode(frame) == spec_text.read_example(text)
    assert codec.encode(spec_text.read_example(text)) == frame


def test_the_example_is_a_whole_exchange() -> None:
    names = [text.partition("(")[0] for text, _ in spec_text.examples(TEXT)]
    one_shot = ["Hello", "Welcome", "Generate", "Accepted", "Tokens", "Tokens", "Ack", "Finished"]
    assert names == [*one_shot, "Spawn", "Spawned", "Append", "Appended", "Continue", "Attach", "Error"]


def test_refresh_changes_nothing_in_a_page_that_is_up_to_date() -> None:
    assert spec_text.refresh(TEXT) == TEXT
    assert spec_text.refresh(TEXT.replace(codec.SCHEMA_HASH, "0" * 16)) == TEXT


def test_numbers_are_unique() -> None:
    numbers = [spec_text.number_of(cls) for cls in spec_text.structs(messages.Message)]
    assert len(set(numbers)) == len(numbers)
