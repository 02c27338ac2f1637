"""The chat format: special tokens, their ids, and the Jinja template that ships in tokenizer_config.json.

Invariants: `render` and CHAT_TEMPLATE give the same text (the test suite compares them); every turn ends with END, which
is also the end-of-sequence token, so generation stops by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
SYSTEM, USER, ASSISTANT = "<|system|>", "<|user|>", "<|assistant|>"
SPECIAL_TOKENS = (BEGIN, END, PAD, SYSTEM, USER, ASSISTANT)  # ids 0 to 5, in this order
BEGIN_ID, END_ID, PAD_ID = 0, 1, 2

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('roles are system, user and assistant') }}{% endif %}"
    "{{ '<|' + message['role'] + '|>' + (message['content'] | trim) + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True, slots=True)
class Turn:
    role: str
    content: str


def render(turns: list[Turn]) -> str:
    return BEGIN + "".join(f"<|{turn.role}|>{turn.content.strip()}{END}" for turn in turns)


def question(prompt: str) -> str:
    """One user turn, ready for the model to answer."""
    return render([Turn("user", prompt)]) + ASSISTANT
