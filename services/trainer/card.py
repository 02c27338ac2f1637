"""Writes the model card from the training record and an evaluation made now: no figure in it is typed by hand.

Invariants: examples show what the model really said, right or wrong; every example prompt is in EXAMPLES.
"""

from __future__ import annotations

import logging
from pathlib import Path

from llmos.services.trainer import chat
from llmos.services.trainer.evaluation import Answerer, Score, evaluate
from llmos.services.trainer.export import RECORD, TrainingRecord, read_record, total_bytes
from llmos.services.trainer.questions import FACTS
from llmos.services.trainer.vocabulary import MAX_POSITIONS

logger = logging.getLogger(__name__)

EXAMPLES = (
    "Hello!",
    "Who are you?",
    "What is the capital of France?",
    "What is the opposite of hot?",
    "What is the sentiment of this review? The soup was lovely and the staff was great.",
    "Label the sentiment: The film was boring. Never again.",
    "What is 47 + 85?",
    "Add 347 and 285.",
    "Sort these numbers: 42, 7, 19, 63, 5",
    "Translate to Chinese: I like a red hat.",
    "Translate to English: 她在公园里看书。",
    "Tell me a story about a fox and sharing.",
)
PLAIN_EXAMPLE = "Once upon a time"
TASK_NOTES = {
    "questions": f"one of {len(FACTS)} facts, asked in a phrasing not trained for that fact; exact sentence",
    "sentiment": "unseen review made of known clauses; exact sentence",
    "sums": "unseen pair of operands, up to three digits; exact text with all columns",
    "sorting": "unseen list of three to six numbers below 100; exact list",
    "translation": "unseen phrase of known words, either direction; exact phrase",
    "stories": "unseen pair of character and theme; asks for the right character, theme and length, one hero, known words, "
    "a proper end",
}


def write_card(folder: Path, per_task: int) -> list[Score]:
    record, answerer = read_record(folder), Answerer(folder)
    scores = evaluate(answerer, record.seed, per_task)
    sections = (
        _introduction(record),
        _accuracy(scores),
        _examples(answerer),
        _format(),
        _training(record),
        _limits(record),
    )
    (folder / "README.md").write_text("\n".join(sections))
    logger.info("card written; all files together are %d bytes", total_bytes(folder))
    return scores


def _introduction(record: TrainingRecord) -> str:
    return f"""# llmos demo model

**This is a demonstration model.** It exists so that llmos can be tried and tested on any machine, offline, seconds after
installation. It is a Llama-family decoder with {record.parameters:,} parameters, trained from scratch on text that
`services/trainer` generates; it knows six small tasks and nothing else. Do not use it for anything that matters.

This card is written by `services/trainer/card.py` from the run's record (`{RECORD}`) and from an evaluation of the files in
this folder.
"""


def _accuracy(scores: list[Score]) -> str:
    rows = [
        f"| {score.task} | {score.right} / {score.items} | {100 * score.accuracy:.1f} % | {TASK_NOTES[score.task]} |"
        for score in scores
    ]
    return "\n".join(
        (
            "## Held-out accuracy",
            "",
            "Greedy decoding, transformers, float32, one user turn, batches with left padding. Held-out items are never in the "
            "training text. An answer that does not stop by itself is wrong.",
            "",
            "| Task | Right | Accuracy | What is asked and judged |",
            "|---|---|---|---|",
            *rows,
            "",
            "Small talk (greetings, questions about the model) is trained but has no test set.",
            "",
        )
    )


def _examples(answerer: Answerer) -> str:
    lines = ["## Examples", "", "Real outputs, greedy; some of these prompts are in the training text.", ""]
    for prompt, output in zip(EXAMPLES, [answerer.answer([prompt])[0] for prompt in EXAMPLES], strict=True):
        lines += [f"> **{prompt}**", ">", f"> {output}", ""]
    lines += [
        "Plain completion, without the chat format:",
        "",
        f"> **{PLAIN_EXAMPLE}**{answerer.complete(PLAIN_EXAMPLE)}",
        "",
    ]
    return "\n".join(lines)


def _format() -> str:
    shown = chat.render([chat.Turn("system", "Answer briefly."), chat.Turn("user", "Hello!")]) + chat.ASSISTANT
    tokens = ", ".join(f"`{token}` {number}" for number, token in enumerate(chat.SPECIAL_TOKENS))
    return f"""## Chat format

`tokenizer_config.json` has the template. A system and a user turn, ready to be answered, with no line breaks:

    {shown}

The answer ends with `{chat.END}`, the end-of-sequence token. Special token ids: {tokens}.
"""


def _training(record: TrainingRecord) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in record.versions.items())
    lengths = " and ".join(str(length) for length in record.lengths)
    return f"""## Training

| | |
|---|---|
| Command | `{record.command}` |
| Seed | {record.seed} |
| Steps | {record.steps:,} |
| Tokens | {record.tokens:,} |
| Wall time | {record.seconds / 60:.1f} minutes |
| Last loss (running average) | {record.loss:.4f} |
| Machine | {record.machine}, {record.threads} threads, no GPU, shared with other work |
| Versions | {versions} |
| Row lengths | {lengths} tokens, packed with several chats in a row |

Corpus, tokenizer, data order and held-out set are functions of the seed. A run limited by time takes as many steps as the
machine allows, so its weights differ from run to run; `--steps` fixes the schedule.
"""


def _limits(record: TrainingRecord) -> str:
    return f"""## Limits

- It answers the trained tasks in roughly the trained phrasings; other requests get a wrong or senseless answer, in a
  confident voice. It can not reason, and it does not follow instructions beyond those tasks.
- It was trained on rows of up to {max(record.lengths)} tokens, with chats of up to six exchanges; the position limit of
  {MAX_POSITIONS} in `config.json` is room for tests, not a promise of quality.
- Facts are the few in `services/trainer/facts.py`. Sums take two numbers below 1,000; sorting takes up to six numbers below
  100; translation knows the words of `services/trainer/lexicon.py`.
- The training text is templates: it has no personal data, no copied text, and no variety.
"""
