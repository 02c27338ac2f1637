"""The tensors of a model directory: one or many safetensors shards, checked before a byte of them is used.

Each shard's header is read and bounded here first (length, JSON, types, sizes that match shapes, tensors that fill the file), then the
safetensors library maps the data. Whatever is missing, corrupt or of another shape is a `ModelError` naming file and tensor.
"""

from __future__ import annotations

import json
import logging
import math
import struct
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from llmos.errors import ModelError
from llmos.services.executor.config_fields import read_json

log = logging.getLogger(__name__)

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
# 200,000 tensors; the format allows 100 MB, which as Python objects is several GB.
_MAX_HEADER_BYTES = 32 * 1024 * 1024
_MAX_DIMENSIONS = 8
_ITEM_BYTES = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}
_FLOATS = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}


class Checkpoint:
    """All tensors of a directory by name. `take` hands each one out once, on `device`; `finish` complains about what nobody took."""

    def __init__(self, directory: Path, device: str = "cpu") -> None:
        self.directory = directory
        self._device = device
        self._headers: dict[str, tuple[Path, str, list[int]]] = {}  # tensor -> (shard, dtype, shape)
        for shard in _shards(directory):
            for name, (dtype, shape) in _read_header(shard).items():
                if name in self._headers:
                    raise ModelError(f"{shard}: tensor {name!r} is already in {self._headers[name][0].name}")
                self._headers[name] = (shard, dtype, shape)
        self._open: dict[Path, Any] = {}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._headers

    def __len__(self) -> int:
        return len(self._headers)

    def names(self) -> tuple[str, ...]:
        return tuple(self._headers)

    @property
    def num_taken(self) -> int:
        return len(self._taken)

    def dtype(self, name: str) -> torch.dtype:
        """The number format a tensor is stored in."""
        shard, dtype, _ = self._find(name)
        if dtype not in _FLOATS:
            raise ModelError(f"{shard}: tensor {name!r} has dtype {dtype}; supported: {', '.join(_FLOATS)}")
        return _FLOATS[dtype]

    def take(self, name: str, *shape: int) -> Tensor:
        """The tensor as stored, which must have this shape."""
        shard, _, found = self._find(name)
        if tuple(found) != shape:
            raise ModelError(f"{shard}: tensor {name!r} has shape {found}, config.json asks for {list(shape)}")
        self.dtype(name)
        self._taken.add(name)
        try:
            if shard not in self._open:
                self._open[shard] = safe_open(shard, framework="pt", device=self._device)
            return self._open[shard].get_tensor(name)
        except (SafetensorError, OSError, ValueError) as error:
            raise ModelError(f"{shard}: tensor {name!r} can not be read: {error}") from None

    def finish(self, *, ignore: tuple[str, ...] = (), owned: str = "model.") -> None:
        """Close the shards. A tensor that nobody took, whose name begins with `owned`, means that config.json describes another model."""
        self._open.clear()
        for name in sorted(self._headers.keys() - self._taken):
            if name.endswith("rotary_emb.inv_freq") or name in ignore:
                continue
            if name.startswith(owned):
                raise ModelError(f"{self._headers[name][0]}: tensor {name!r} has no place in the model of config.json")
            log.warning("%s: tensor %r is not used", self._headers[name][0], name)

    def _find(self, name: str) -> tuple[Path, str, list[int]]:
        if name not in self._headers:
            raise ModelError(f"{self.directory}: tensor {name!r} is missing from the safetensors files")
        return self._headers[name]


def _shards(directory: Path) -> list[Path]:
    index = directory / INDEX_FILE
    if not index.exists():
        if (directory / SINGLE_FILE).is_file():
            return [directory / SINGLE_FILE]
        hint = "; weights in pickle form (*.bin) are not read" if any(directory.glob("*.bin")) else ""
        raise ModelError(f"{directory}: neither {SINGLE_FILE} nor {INDEX_FILE} is there{hint}")
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ModelError(f"{index}: weight_map: is missing or empty")
    names = list(weight_map.values())
    for name in names:
        if not isinstance(name, str) or Path(name).name != name:
            raise ModelError(f"{index}: weight_map: {name!r} is not a file name")
        if not (directory / name).is_file():
            raise ModelError(f"{directory / name}: no such file, but {INDEX_FILE} names it")
    return [directory / name for name in sorted(set(names))]


def _read_header(shard: Path) -> dict[str, tuple[str, list[int]]]:
    """Tensor name -> (dtype, shape) of one shard; raises `ModelError` if the file contradicts itself."""
    try:
        size = shard.stat().st_size
        with shard.open("rb") as file:
            start = file.read(8)
            length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
            if not 2 <= length <= min(size - 8, _MAX_HEADER_BYTES):
                raise ModelError(f"{shard}: not a safetensors file: header length {length} in a file of {size} bytes")
            header = json.loads(file.read(length))
    except OSError as error:
        raise ModelError(f"{shard}: can not be read: {error.strerror}") from None
    except (ValueError, RecursionError):
        raise ModelError(f"{shard}: not a safetensors file: the header is not JSON") from None
    if not isinstance(header, dict):
        raise ModelError(f"{shard}: not a safetensors file: the header is not an object")
    header.pop("__metadata__", None)
    data_bytes = size - 8 - length
    found = {name: _check_entry(shard, name, entry, data_bytes) for name, entry in header.items()}
    _check_layout(shard, {name: header[name]["data_offsets"] for name in found}, data_bytes)
    return found


def _check_layout(shard: Path, offsets: dict[str, list[int]], data_bytes: int) -> None:
    """No byte is two tensors', and none is nobody's."""
    at = 0
    for name, (begin, end) in sorted(offsets.items(), key=lambda item: item[1]):
        if begin != at:
            problem = "overlaps the one before" if begin < at else "leaves a hole before it"
            raise ModelError(f"{shard}: corrupt: tensor {name!r} begins at byte {begin}, not {at}: it {problem}")
        at = end
    if at != data_bytes:
        raise ModelError(f"{shard}: corrupt: {data_bytes - at} bytes after the last tensor are no tensor's")


def _check_entry(shard: Path, name: str, entry: Any, data_bytes: int) -> tuple[str, list[int]]:
    try:
        dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
        ok = isinstance(dtype, str) and isinstance(shape, list) and len(shape) <= _MAX_DIMENSIONS
        ok = ok and all(type(n) is int and n >= 0 for n in [*shape, begin, end])  # True is an int, too
    except (KeyError, TypeError, ValueError):
        ok = False
    if not ok:
        raise ModelError(f"{shard}: corrupt: tensor {name!r} has a malformed header entry")
    if dtype not in _ITEM_BYTES:
        raise ModelError(f"{shard}: tensor {name!r} has the unknown dtype {dtype[:32]!r}")
    if not begin <= end <= data_bytes:
        raise ModelError(f"{shard}: corrupt: tensor {name!r} ends at byte {end} of {data_bytes}: the file is cut short")
    if math.prod(shape) * _ITEM_BYTES[dtype] != end - begin:
        raise ModelError(f"{shard}: corrupt: tensor {name!r} of shape {shape} has {end - begin} bytes")
    return dtype, list(shape)
