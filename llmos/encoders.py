"""Which models are encoders: what `config.json` of a model directory says about what the model is for. Pure, for everybody who has to
know: the executor that loads it, the tokenizer that tells the gateways.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

GENERATE: Final = "generate"
EMBED: Final = "embed"
CLASSIFY: Final = "classify"

# Families of encoders by `model_type`, and how the names of their classes begin.
FAMILIES: Final = {
    "bert": "Bert",
    "roberta": "Roberta",
    "xlm-roberta": "XLMRoberta",
    "camembert": "Camembert",
    "distilbert": "DistilBert",
    "mpnet": "MPNet",
}
# Families whose positions are counted from behind the padding token's number.
_SHIFTED: Final = frozenset({"roberta", "xlm-roberta", "camembert", "mpnet"})
_TASKS: Final = {
    "Model": EMBED,
    "ForMaskedLM": EMBED,
    "ForPreTraining": EMBED,
    "ForSequenceClassification": CLASSIFY,
}
ARCHITECTURES: Final = {
    prefix + suffix: (family, task) for family, prefix in FAMILIES.items() for suffix, task in _TASKS.items()
}


def find_encoder(config: Mapping[str, Any]) -> tuple[str, str] | None:
    """(family, task) if config.json describes an encoder; None: it is something else."""
    architectures = config.get("architectures")
    if isinstance(architectures, list) and architectures:
        return next((ARCHITECTURES[name] for name in architectures if name in ARCHITECTURES), None)
    kind = config.get("model_type")
    return (kind, EMBED) if isinstance(kind, str) and kind in FAMILIES else None


def first_position(family: str, config: Mapping[str, Any]) -> int:
    """Number of the position of a text's first token."""
    padding = config.get("pad_token_id")
    if family not in _SHIFTED:
        return 0
    return 1 + (padding if isinstance(padding, int) and not isinstance(padding, bool) else 1)


def longest_text(family: str, config: Mapping[str, Any], sentence_config: Mapping[str, Any]) -> int | None:
    """Most tokens of a text: as many as there are positions, or fewer if sentence_bert_config.json says so. None: config.json is silent."""
    positions = config.get("max_position_embeddings")
    if not isinstance(positions, int) or isinstance(positions, bool):
        return None
    longest = positions - first_position(family, config)
    chosen = sentence_config.get("max_seq_length")
    if isinstance(chosen, int) and not isinstance(chosen, bool) and 0 < chosen < longest:
        return chosen
    return longest


def class_names(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the classes in their order; () if the file has none, or only numbers them."""
    found = config.get("id2label")
    if not isinstance(found, dict):
        return ()
    names = [found.get(str(index)) for index in range(len(found))]
    if not all(isinstance(name, str) for name in names) or names == [f"LABEL_{i}" for i in range(len(names))]:
        return ()
    return tuple(str(name) for name in names)
