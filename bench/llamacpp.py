"""llama.cpp through llama-cpp-python as the mark to reach: a BF16 GGUF of the same weights, one batched greedy decode loop.

Runs in any interpreter that has `llama_cpp`, `gguf` and numpy; it needs neither torch nor llmos.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np
import numpy.typing as npt
from common import model_config, safetensors_header
from gguf import GGMLQuantizationType, GGUFWriter

LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
TOP_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}


def gguf_of(model: Path) -> Path:
    """Write the Llama in `model` (bfloat16 safetensors) as GGUF beside it, once."""
    target = model / "bf16.gguf"
    if target.exists():
        return target
    config = model_config(model)
    partial = target.with_suffix(".partial")
    writer = GGUFWriter(str(partial), "llama")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_dimension_count(config["hidden_size"] // config["num_attention_heads"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("none")
    for path in sorted(model.glob("*.safetensors")):
        _add_tensors(writer, path, config)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def _add_tensors(writer: GGUFWriter, path: Path, config: dict[str, Any]) -> None:
    header = safetensors_header(path)
    header_bytes = 8 + int.from_bytes(path.open("rb").read(8), "little")
    data = np.memmap(path, dtype=np.uint8, mode="r", offset=header_bytes)
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        if entry["dtype"] != "BF16":
            raise RuntimeError(f"{path.name}: {name} is {entry['dtype']}, expected BF16")
        begin, end = entry["data_offsets"]
        values = data[begin:end].view(np.uint16).reshape(entry["shape"])
        if name.endswith("q_proj.weight"):
            values = _interleave(values, config["num_attention_heads"])
        elif name.endswith("k_proj.weight"):
            values = _interleave(values, config["num_key_value_heads"])
        if values.ndim == 1:
            writer.add_tensor(_gguf_name(name), (values.astype(np.uint32) << 16).view(np.float32))
        else:
            raw = np.ascontiguousarray(values).view(np.uint8)
            writer.add_tensor(_gguf_name(name), raw, raw_dtype=GGMLQuantizationType.BF16)


def _interleave(weight: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp rotates neighbouring pairs, Hugging Face the two halves of a head."""
    rows, columns = weight.shape
    return weight.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)


def _gguf_name(name: str) -> str:
    stem = name.removesuffix(".weight")
    if stem in TOP_NAMES:
        return f"{TOP_NAMES[stem]}.weight"
    layer, _, part = stem.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{LAYER_NAMES[part]}.weight"


class LlamaCpp:
    """One loaded model. Each call decodes one batch of equally long prompts from an empty cache."""

    def __init__(self, model: Path, threads: int) -> None:
        llama_cpp.llama_backend_init()
        parameters = llama_cpp.llama_model_default_params()
        self._model = llama_cpp.llama_model_load_from_file(str(gguf_of(model)).encode(), parameters)
        assert self._model, "llama.cpp could not load the GGUF"
        self._vocab_size = model_config(model)["vocab_size"]
        self._threads = threads

    def generate(self, prompts: list[list[int]], output_tokens: int) -> int:
        context = self._context(len(prompts), len(prompts[0]) + output_tokens)
        batch = llama_cpp.llama_batch_init(len(prompts) * len(prompts[0]), 0, 1)
        try:
            newest = self._step(context, batch, prompts, 0)
            for position in range(len(prompts[0]), len(prompts[0]) + output_tokens - 1):
                newest = self._step(context, batch, [[token] for token in newest], position)
        finally:
            llama_cpp.llama_batch_free(batch)
            llama_cpp.llama_free(context)
        return len(newest) * output_tokens

    def _context(self, sequences: int, length: int) -> Any:
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = sequences * (length + 255) // 256 * 256
        parameters.n_batch = parameters.n_ctx
        parameters.n_seq_max = sequences
        parameters.n_threads = parameters.n_threads_batch = self._threads
        parameters.kv_unified = True
        context = llama_cpp.llama_init_from_model(self._model, parameters)
        assert context, "llama.cpp could not make a context"
        return context

    def _step(self, context: Any, batch: Any, tokens: list[list[int]], position: int) -> list[int]:
        """Compute `tokens` of each sequence from `position` on; the greedy next token of each."""
        filled = 0
        last = []
        for sequence, ids in enumerate(tokens):
            for offset, token in enumerate(ids):
                batch.token[filled] = token
                batch.pos[filled] = position + offset
                batch.n_seq_id[filled] = 1
                batch.seq_id[filled][0] = sequence
                batch.logits[filled] = offset == len(ids) - 1
                filled += 1
            last.append(filled - 1)
        batch.n_tokens = filled
        code = llama_cpp.llama_decode(context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode: {code}")
        return [self._argmax(context, index) for index in last]

    def _argmax(self, context: Any, index: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(context, index)
        return int(np.argmax(np.ctypeslib.as_array(logits, shape=(self._vocab_size,))))
