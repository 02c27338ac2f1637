"""The beam search of examples/, made of forks, against transformers' own on the same weights."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from daemon import running
from small_models import make_model

from llmos import Client

pytestmark = pytest.mark.slow
EXAMPLE = Path(__file__).parents[2] / "examples" / "beam_search.py"


def example(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The example as a module; its dataclass looks itself up in `sys.modules`."""
    spec = importlib.util.spec_from_file_location("beam_search_example", EXAMPLE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


def test_forks_find_what_transformers_finds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    width, length = 4, 10
    model = make_model("qwen3", tmp_path / "model")
    prompt = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5]
    with torch.inference_mode():
        ids = torch.tensor([prompt])
        reference = model.generate(
            ids, attention_mask=torch.ones_like(ids), num_beams=width, num_return_sequences=width, do_sample=False,
            max_new_tokens=length, pad_token_id=0, length_penalty=0.0, return_dict_in_generate=True, output_scores=True,
        )  # fmt: skip
    config = (
        f'[[models]]\nname = "small"\npath = "{tmp_path / "model"}"\ndtype = "float32"\npage_size = 8\nthreads = 1\n'
    )
    with running(config) as daemon, Client(daemon.run_dir) as client:
        beams = example(monkeypatch).beam_search(client, prompt, width, length)
        assert len(client.ps()) == width
        for beam in beams:
            beam.sequence.close()
        copied = client.status().lanes[0].pages_copied
    assert [beam.token_ids for beam in beams] == [tuple(row[len(prompt) :].tolist()) for row in reference.sequences]
    assert [beam.logprob for beam in beams] == pytest.approx(reference.sequences_scores.tolist(), abs=1e-3)
    assert copied > 0
