"""What keeping weights in fewer bits costs: perplexity and greedy agreement on held-out text, by `weights` of the CPU executor.

    python bench/quality.py                    # the embedded demonstration model, its trainer's held-out items
    python bench/quality.py --per-task 200

Every held-out dialogue is computed once in each format with the right answer in place. Perplexity is that of the answers' tokens;
agreement is how often the most likely token is the same as with the weights as they are, at the same places; the log-probability
error is the mean distance of the right tokens' log-probabilities.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import machine, versions
from tokenizers import Tokenizer
from torch import Tensor

import llmos
from llmos.services.executor.batch import ForwardBatch
from llmos.services.executor.kv_cache import KVCache
from llmos.services.executor.linear import linear_factory
from llmos.services.executor.loader import load_decoder
from llmos.services.executor.native.decoder import NativeDecoder
from llmos.services.executor.rows import RowTable
from llmos.services.executor.spec import read_spec
from llmos.services.trainer.chat import END, question
from llmos.services.trainer.corpus import held_out

DEMO = Path(llmos.__file__).parent / "assets" / "demo-model"
FORMATS = ("as_is", "int8", "int4")
PAGE_SIZE = 16
Dialogue = tuple[list[int], int]  # tokens, where the answer begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=DEMO)
    parser.add_argument("--per-task", type=int, default=60)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--out", type=Path, help="JSON file (default: bench/results/quality-DATE.json)")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    dialogues = read_dialogues(arguments.model, arguments.per_task)
    reference: list[tuple[Tensor, Tensor]] = []
    results = []
    for name in FORMATS:
        with torch.inference_mode():
            found = compute(arguments.model, name, dialogues)
        reference = reference or found
        results.append({"weights": name, **compare(found, reference)})
        print(json.dumps(results[-1]), flush=True)
    facts = {"machine": machine(), "versions": versions(), "model": arguments.model.name, "dialogues": len(dialogues)}
    path = arguments.out or Path(__file__).parent / "results" / f"quality-{facts['machine']['date'][:10]}.json"
    path.write_text(json.dumps(facts | {"results": results}, indent=1) + "\n")
    print(f"written to {path}")


def read_dialogues(model: Path, per_task: int) -> list[Dialogue]:
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    seed = json.loads((model / "training.json").read_text())["seed"]
    dialogues = []
    for items in held_out(seed, per_task).values():
        for item in items:
            asked = tokenizer.encode(question(item.prompt), add_special_tokens=False).ids
            answer = tokenizer.encode(item.answer + END, add_special_tokens=False).ids
            dialogues.append(([*asked, *answer], len(asked)))
    return dialogues


def compute(model: Path, weights: str, dialogues: list[Dialogue]) -> list[tuple[Tensor, Tensor]]:
    """For each dialogue: log-probabilities of the answer's tokens, and the most likely tokens at their places."""
    spec = read_spec(model)
    decoder, dtype = load_decoder(model, spec, "auto", linear_factory(weights), lambda: None)
    longest = max(len(tokens) for tokens, _ in dialogues)
    pages = -(-longest // PAGE_SIZE)
    cache = KVCache(spec, pages, PAGE_SIZE, dtype)
    rows = RowTable(1, pages * PAGE_SIZE, PAGE_SIZE, pages)
    rows.pages[0, :pages] = np.arange(pages)
    native = NativeDecoder(decoder, cache, rows)
    found = []
    for tokens, begin in dialogues:
        positions, token_rows = np.arange(len(tokens)), np.zeros(len(tokens), dtype=np.int64)
        ids = torch.tensor(tokens)
        slots = cache.slot_index(*rows.slots_of(token_rows, positions))
        nothing = torch.empty(0, dtype=torch.int64)
        batch = ForwardBatch(ids, token_rows, torch.from_numpy(positions), slots, (), (), nothing, token_rows[:0])
        logprobs = native.logits(native.forward(batch)[begin - 1 : -1]).log_softmax(1)
        found.append((logprobs.gather(1, ids[begin:, None])[:, 0], logprobs.argmax(1)))
    return found


def compare(found: list[tuple[Tensor, Tensor]], reference: list[tuple[Tensor, Tensor]]) -> dict[str, Any]:
    logprobs, best = (torch.cat([entry[index] for entry in found]) for index in range(2))
    exact, usual = (torch.cat([entry[index] for entry in reference]) for index in range(2))
    return {
        "answer_tokens": len(best),
        "perplexity": math.exp(-float(logprobs.double().mean())),
        "perplexity_ratio": math.exp(float((exact - logprobs).double().mean())),
        "greedy_agreement": float((best == usual).double().mean()),
        "mean_logprob_error": float((logprobs - exact).abs().double().mean()),
    }


if __name__ == "__main__":
    main()
