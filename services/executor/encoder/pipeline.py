"""What happens to an encoder's token vectors, as a sentence-transformers directory says it: pooling, dense layers, normalisation.

`modules.json` lists the steps; each has a folder with a `config.json`. Without that file the mean over a text's tokens is taken and
nothing else is done, as sentence-transformers does. Imports no torch.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

from llmos.errors import ModelError
from llmos.services.executor.config_fields import ConfigFields, read_json

log = logging.getLogger(__name__)
MODULES_FILE = "modules.json"
PROMPTS_FILE = "config_sentence_transformers.json"
# In the order in which several of them are put one behind the other.
POOLINGS = {
    "pooling_mode_cls_token": "cls",
    "pooling_mode_max_tokens": "max",
    "pooling_mode_mean_tokens": "mean",
    "pooling_mode_mean_sqrt_len_tokens": "mean_sqrt_len",
}
_UNSUPPORTED = ("pooling_mode_weightedmean_tokens", "pooling_mode_lasttoken")
DENSE_ACTIVATIONS = ("identity", "tanh", "relu", "gelu", "sigmoid")


@dataclass(frozen=True, slots=True)
class Dense:
    """A linear layer whose weights lie in `folder`."""

    folder: Path
    in_features: int
    out_features: int
    bias: bool
    activation: str


@dataclass(frozen=True, slots=True)
class Pipeline:
    """`poolings` are put one behind the other."""

    poolings: tuple[str, ...] = ("mean",)
    dense: tuple[Dense, ...] = ()
    normalize: bool = False

    def output_size(self, hidden_size: int) -> int:
        return self.dense[-1].out_features if self.dense else hidden_size * len(self.poolings)


def read_pipeline(directory: Path, hidden_size: int) -> Pipeline:
    """Read and check what stands beside the model; raises `ModelError`."""
    path = directory / MODULES_FILE
    if not path.exists():
        return Pipeline()
    poolings: tuple[str, ...] = ()
    dense: list[Dense] = []
    normalize = False
    for kind, folder in _modules(path):
        if kind == "Transformer":
            if folder != directory:
                raise ModelError(f"{path}: the model lies in {folder.name!r}; it must lie beside {MODULES_FILE}")
        elif kind == "Pooling" and not poolings:
            poolings = _poolings(folder, hidden_size)
        elif kind == "Dense" and poolings and not normalize:
            width = dense[-1].out_features if dense else hidden_size * len(poolings)
            dense.append(_dense(folder, width))
        elif kind == "Normalize" and poolings:
            normalize = True
        else:
            raise ModelError(f"{path}: a module {kind!r} at this place is not supported")
    if not poolings:
        raise ModelError(f"{path}: has no Pooling module")
    _look_for_prompts(directory)
    return Pipeline(poolings, tuple(dense), normalize)


def _modules(path: Path) -> list[tuple[str, Path]]:
    """(class name, folder) of each."""
    found = []
    for entry in read_json_list(path):
        kind, folder = entry.get("type"), entry.get("path")
        if (
            not isinstance(kind, str)
            or not isinstance(folder, str)
            or ".." in Path(folder).parts
            or Path(folder).is_absolute()
        ):
            raise ModelError(f"{path}: an entry has no type, or no path inside this directory")
        found.append((kind.rsplit(".", 1)[-1], path.parent / folder if folder not in ("", ".") else path.parent))
    return found


def read_json_list(path: Path) -> list[dict[str, object]]:
    """A JSON list of objects."""
    found = read_json(path, kind=list)
    if not all(isinstance(entry, dict) for entry in found):
        raise ModelError(f"{path}: holds something else than objects")
    return found


def _poolings(folder: Path, hidden_size: int) -> tuple[str, ...]:
    fields = ConfigFields.read(folder, "config.json")
    width = fields.integer("word_embedding_dimension", default=hidden_size)
    if width != hidden_size:
        raise fields.error("word_embedding_dimension", f"{width}, but the model's hidden size is {hidden_size}")
    for key in _UNSUPPORTED:
        if fields.boolean(key, False):
            raise fields.error(key, f"is not supported; supported: {', '.join(POOLINGS)}")
    if not fields.boolean("include_prompt", True):
        raise fields.error("include_prompt", "only true is supported")
    mode = fields.raw.get("pooling_mode")  # how newer versions write it
    if isinstance(mode, str):
        mode = [mode]
    if isinstance(mode, list) and mode:
        unknown = [name for name in mode if name not in POOLINGS.values()]
        if unknown:
            raise fields.error(
                "pooling_mode", f"{unknown[0]!r} is not supported; supported: {', '.join(POOLINGS.values())}"
            )
        chosen = tuple(name for name in POOLINGS.values() if name in mode)
    else:
        chosen = tuple(name for key, name in POOLINGS.items() if fields.boolean(key, False))
    if not chosen:
        raise fields.error("pooling_mode_mean_tokens", "no kind of pooling is switched on")
    return chosen


def _dense(folder: Path, width: int) -> Dense:
    fields = ConfigFields.read(folder, "config.json")
    features = fields.integer("in_features")
    if features != width:
        raise fields.error("in_features", f"{features}, but {width} numbers come in")
    name = fields.text("activation_function", "torch.nn.modules.activation.Tanh").rsplit(".", 1)[-1].lower()
    if name not in DENSE_ACTIVATIONS:
        raise fields.error(
            "activation_function", f"{name!r} is not supported; supported: {', '.join(DENSE_ACTIVATIONS)}"
        )
    return Dense(folder, features, fields.integer("out_features"), fields.boolean("bias", True), name)


def _look_for_prompts(directory: Path) -> None:
    """Words that some models want in front of a text are the caller's business."""
    path = directory / PROMPTS_FILE
    if path.exists() and read_json(path).get("default_prompt_name") is not None:
        log.warning("%s: default_prompt_name is not applied; put the prompt in front of the text", path)
