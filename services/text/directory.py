"""What a Hugging Face model directory says beside its weights: generation defaults, context, special tokens.

Everything here raises `ModelError` that names the file; a missing optional file is an empty one.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llmos.encoders import CLASSIFY, GENERATE, class_names, find_encoder, longest_text
from llmos.errors import InvalidRequest, ModelError
from llmos.protocol.params import SamplingParams

SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_CONTEXT_KEYS = ("max_position_embeddings", "n_positions", "max_sequence_length", "seq_length")


class ModelDirectory:
    """The parsed settings of one directory. `config` is the text model's part where a model has several."""

    def __init__(self, path: Path, *, required: bool = True) -> None:
        """`required` False: a directory that is not there is an empty one."""
        if required and not path.is_dir():
            raise ModelError(f"{path}: no such directory", field="path")
        self.path = path
        whole = self.read("config.json")
        nested = whole.get("text_config")
        self.config: dict[str, Any] = {**whole, **nested} if isinstance(nested, dict) else whole
        self.generation = self.read("generation_config.json")
        self.tokenizer = self.read("tokenizer_config.json")
        self.special_tokens = self._special_tokens()
        for name, content in (("config.json", whole), ("tokenizer_config.json", self.tokenizer)):
            if content.get("auto_map") is not None:
                text = f"{path / name}: auto_map: the model brings code of its own, which llmos does not run"
                raise ModelError(text, field="auto_map")

    def read(self, name: str) -> dict[str, Any]:
        """One JSON file; {} if it is not there."""
        file = self.path / name
        try:
            found = json.loads(file.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise ModelError(f"{file}: {error}", field=name) from None
        if not isinstance(found, dict):
            raise ModelError(f"{file}: not a JSON object", field=name)
        return found

    def _special_tokens(self) -> dict[str, str]:
        """Named special tokens, as chat templates see them; special_tokens_map.json is the older place."""
        older = self.read("special_tokens_map.json")
        found = {}
        for name in SPECIAL_TOKENS:
            value = self.tokenizer.get(name, older.get(name))
            if isinstance(value, dict):  # an added token with its settings
                value = value.get("content")
            if isinstance(value, str):
                found[name] = value
        return found

    def vocab_size(self) -> int | None:
        """Width of the model's logits; None if config.json does not say."""
        return self._positive("vocab_size", self.config.get("vocab_size"))

    @property
    def task(self) -> str:
        """What the model is for, as in `ModelInfo`."""
        found = find_encoder(self.config)
        return GENERATE if found is None else found[1]

    def labels(self) -> tuple[str, ...]:
        return class_names(self.config) if self.task == CLASSIFY else ()

    def max_context(self, limit: int) -> int:
        """Longest prompt and output together; `limit` 0 = what the model was made for."""
        if (encoder := find_encoder(self.config)) is not None:
            longest = longest_text(encoder[0], self.config, self.read("sentence_bert_config.json"))
            if longest is not None and longest > 0:
                return min(longest, limit) if limit else longest
        for key in _CONTEXT_KEYS:
            own = self._positive(key, self.config.get(key))
            if own is not None:
                return min(own, limit) if limit else own
        if not limit:
            raise ModelError(f"{self.path / 'config.json'}: no {_CONTEXT_KEYS[0]}", field=_CONTEXT_KEYS[0])
        return limit

    def eos_token_ids(self) -> tuple[int, ...]:
        """Where `transformers.generate` would stop: generation_config.json, else config.json; () if neither says."""
        for source in (self.generation, self.config):
            value = source.get("eos_token_id")
            if value is not None:
                return tuple(self._token_id(found) for found in (value if isinstance(value, list) else [value]))
        return ()

    def sampling_defaults(self) -> SamplingParams:
        """The model's own settings, by the rules of `transformers.generate`: greedy unless `do_sample` is true."""
        sample = self.generation.get("do_sample") is True
        settings = self.generation if sample else {}
        params = SamplingParams(
            temperature=self._number("temperature", settings.get("temperature"), 1.0 if sample else 0.0),
            top_k=max(0, int(self._number("top_k", settings.get("top_k"), 0))),
            top_p=self._number("top_p", settings.get("top_p"), 1.0),
            min_p=self._number("min_p", settings.get("min_p"), 0.0),
            repetition_penalty=self._number("repetition_penalty", self.generation.get("repetition_penalty"), 1.0),
        )
        try:
            params.check()
        except InvalidRequest as error:
            raise ModelError(f"{self.path / 'generation_config.json'}: {error.message}", field=error.field) from None
        return params

    def _number(self, key: str, value: Any, default: float) -> float:
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ModelError(f"{self.path / 'generation_config.json'}: {key} is {value!r}, not a number", field=key)
        return value

    def _positive(self, key: str, value: Any) -> int | None:
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{self.path / 'config.json'}: {key} is {value!r}, not a positive integer", field=key)
        return value

    def _token_id(self, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 0:
            raise ModelError(f"{self.path}: eos_token_id holds {value!r}, not a token id", field="eos_token_id")
        return value
