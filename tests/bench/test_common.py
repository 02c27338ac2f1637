"""Statistics, seeded prompts and the weight count that the floor rests on."""

from __future__ import annotations

import json
import struct

import pytest
from common import machine, percentile, prompts, safetensors_header, weight_bytes


def write_safetensors(path, tensors):
    """A file with `tensors`: name -> bytes; dtype and shape do not matter here."""
    header, end = {"__metadata__": {"format": "pt"}}, 0
    for name, size in tensors.items():
        header[name] = {"dtype": "BF16", "shape": [size // 2], "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(end))


def test_percentile_interpolates():
    assert percentile([1.0, 2.0, 3.0, 4.0], 0.5) == 2.5
    assert percentile([7.0], 0.99) == 7.0
    assert percentile([], 0.5) == 0.0


def test_prompts_are_seeded_and_all_different():
    assert prompts(4, 16, 32000) == prompts(4, 16, 32000)
    assert prompts(4, 16, 32000, seed=1) != prompts(4, 16, 32000, seed=2)
    made = prompts(32, 16, 100)
    assert {len(prompt) for prompt in made} == {16}
    assert len({tuple(prompt) for prompt in made}) == 32
    assert all(3 <= token < 100 for prompt in made for token in prompt)


@pytest.mark.parametrize(
    ("tensors", "expected"),
    [
        ({"model.embed_tokens.weight": 100, "model.norm.weight": 10}, 110),  # tied: the table is also the head
        ({"model.embed_tokens.weight": 100, "lm_head.weight": 100, "model.norm.weight": 10}, 110),
    ],
)
def test_weight_bytes_counts_what_a_step_reads(tmp_path, tensors, expected):
    write_safetensors(tmp_path / "model.safetensors", tensors)
    assert weight_bytes(tmp_path) == expected
    assert safetensors_header(tmp_path / "model.safetensors")["model.norm.weight"]["data_offsets"][1] == sum(
        tensors.values()
    )


def test_weight_bytes_sees_an_untied_head_in_another_shard(tmp_path):
    write_safetensors(tmp_path / "model-1.safetensors", {"model.embed_tokens.weight": 100, "model.norm.weight": 10})
    write_safetensors(tmp_path / "model-2.safetensors", {"lm_head.weight": 100})
    assert weight_bytes(tmp_path) == 110


def test_machine_names_what_numbers_depend_on():
    found = machine()
    assert found["cores"] >= 1
    assert {"cpu", "memory_gib", "vector_units", "load_1min", "date"} <= set(found)
    json.dumps(found)
