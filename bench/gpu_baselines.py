"""Other people's engines and kernels on the same machine in the same run. Part "baselines" of gpu.py.

Whatever is not installed is named as such; whatever raises is recorded with its message and costs nobody else their turn.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Callable
from typing import Any

from gpu_engine import nano_jobs, sequences
from gpu_kernels import decode_case
from gpu_world import LLAMA_8B, QWEN, TINY, ModelShape, World, say, seconds

SUBSET = 64  # sequences for the slow ones; ours runs the same subset
POINTS = ((64, 4096), (1, 32_768))
_REFUSALS = (
    ImportError,
    RuntimeError,
    ValueError,
    TypeError,
    AttributeError,
    NotImplementedError,
    AssertionError,
    OSError,
    KeyError,
)


def baselines(world: World) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, run in (
        ("flash_attn", _flash_attention), ("flashinfer", _flashinfer), ("vllm_flash_attn", _vllm_flash),
        ("transformers continuous batching", _transformers), ("vllm", _vllm),
    ):  # fmt: skip
        if world.late(10.0):
            found[name] = "left out: no time"
            continue
        try:
            found[name] = run(world)
        except _REFUSALS as error:
            found[name] = f"{type(error).__name__}: {error}"[:500]
        say(f"  {name}: {found[name]}")
    if not world.late(25.0) and isinstance(found["transformers continuous batching"], dict):
        found["ours, the same sequences"] = sequences(world, SUBSET)
    return found


def _decode_points(world: World, attend: Callable[..., Callable[[], Any]]) -> list[dict[str, Any]]:
    """`attend(q, k, v, table, lengths, size)`, pages as [pages, tokens, heads, dim], gives the call that is timed."""
    found = []
    for shape in (TINY,) if world.dry else (QWEN, LLAMA_8B):
        for batch, context in ((2, 20),) if world.dry else POINTS:
            case = decode_case(world, shape, 64 if world.dry else shape.head_dim, batch, context)
            if case is None or world.late(5.0):
                continue
            q, kv, table, _, lengths, size = case
            k, v = (pages.transpose(1, 2).contiguous() for pages in kv)
            took = seconds(world, attend(q, k, v, table, lengths, size), inner=1)
            num_bytes = 2 * batch * context * shape.kv_heads * q.shape[-1] * q.element_size()
            share = num_bytes / took / world.bandwidth
            found.append({"model": shape.name, "batch": batch, "context": context, "us": took * 1e6, "share": share})
    return found


def _flash_attention(world: World) -> Any:
    flash = importlib.import_module("flash_attn")

    def attend(q: Any, k: Any, v: Any, table: Any, lengths: Any, size: int) -> Callable[[], Any]:
        if size % 256:  # what FlashAttention 2 asks of pages
            pages = 256 // size
            k, v = (
                part.view(-1, 256, *part.shape[2:])
                for part in (k[: len(k) // pages * pages], v[: len(v) // pages * pages])
            )
            table = (table[:, ::pages] // pages).contiguous()
        return lambda: flash.flash_attn_with_kvcache(q[:, None], k, v, cache_seqlens=lengths, block_table=table)

    return _decode_points(world, attend)


def _vllm_flash(world: World) -> Any:
    flash = importlib.import_module("vllm.vllm_flash_attn")
    import torch

    def attend(q: Any, k: Any, v: Any, table: Any, lengths: Any, size: int) -> Callable[[], Any]:
        starts = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32)
        most = int(lengths.max())
        return lambda: flash.flash_attn_varlen_func(
            q,
            k,
            v,
            max_seqlen_q=1,
            cu_seqlens_q=starts,
            max_seqlen_k=most,
            seqused_k=lengths,
            block_table=table,
            fa_version=3,
        )

    return _decode_points(world, attend)


def _flashinfer(world: World) -> Any:
    flashinfer = importlib.import_module("flashinfer")
    import torch

    def attend(q: Any, k: Any, v: Any, table: Any, lengths: Any, size: int) -> Callable[[], Any]:
        space = torch.empty(256 << 20, dtype=torch.uint8, device=q.device)
        wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(space, "NHD")
        starts = torch.arange(len(q) + 1, device=q.device, dtype=torch.int32) * table.shape[1]
        last = (lengths - 1) % size + 1
        wrapper.plan(starts, table.flatten(), last, q.shape[1], k.shape[2], q.shape[2], size, q_data_type=q.dtype)
        return lambda: wrapper.run(q, (k, v))

    return _decode_points(world, attend)


def _config(shape: ModelShape) -> Any:
    from transformers import Qwen3Config

    return Qwen3Config(
        hidden_size=shape.hidden, num_hidden_layers=shape.layers, num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        head_dim=shape.head_dim, intermediate_size=shape.ffn, vocab_size=shape.vocab, tie_word_embeddings=True,
        max_position_embeddings=4096,
        bos_token_id=None, eos_token_id=None, dtype="bfloat16",
    )  # fmt: skip


def _transformers(world: World) -> dict[str, Any]:
    """Continuous batching as installed, over a subset with the same prompts. It takes one output length for all: the mean of theirs."""
    import torch
    from transformers import GenerationConfig, Qwen3ForCausalLM

    shape = TINY if world.dry else QWEN
    jobs = nano_jobs(3 if world.dry else SUBSET, shape.vocab, small=world.dry)
    with torch.device(world.device):
        model = Qwen3ForCausalLM(_config(shape)).to(torch.float32 if world.dry else torch.bfloat16).eval()
    mean = sum(output for _, output in jobs) // len(jobs)
    config = GenerationConfig(
        max_new_tokens=mean, min_new_tokens=mean, do_sample=False, eos_token_id=-1, pad_token_id=0, use_cuda_graph=False
    )
    with torch.inference_mode(False), torch.no_grad():
        started = time.perf_counter()
        outputs = model.generate_batch(
            inputs=[prompt for prompt, _ in jobs], generation_config=config, warmup=not world.dry
        )
        took = time.perf_counter() - started
    tokens = sum(len(output.generated_tokens) for output in outputs.values())
    return {"sequences": len(jobs), "output_tokens": tokens, "s": took, "tokens_per_s": tokens / took, "each": mean}


def _vllm(world: World) -> dict[str, Any]:
    """The engine itself with random weights, if it is installed."""
    import tempfile

    vllm = importlib.import_module("vllm")
    jobs = nano_jobs(256, QWEN.vocab, small=False)
    with tempfile.TemporaryDirectory() as folder:
        _config(QWEN).save_pretrained(folder)
        engine = vllm.LLM(
            model=folder, load_format="dummy", skip_tokenizer_init=True, max_model_len=4096, max_num_seqs=256
        )
        params = [
            vllm.SamplingParams(temperature=0.6, ignore_eos=True, max_tokens=output, detokenize=False)
            for _, output in jobs
        ]
        prompts = [{"prompt_token_ids": prompt} for prompt, _ in jobs]
        engine.generate(prompts[:1], params[:1], use_tqdm=False)
        started = time.perf_counter()
        engine.generate(prompts, params, use_tqdm=False)
        took = time.perf_counter() - started
    output = sum(count for _, count in jobs)
    return {"sequences": 256, "output_tokens": output, "s": took, "tokens_per_s": output / took}
