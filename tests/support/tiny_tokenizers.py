"""Small tokenizers of each kind that real models use, trained in a second, and model directories made of them."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

SPECIAL = [
    "<s>",
    "</s>",
    "<|im_start|>",
    "<|im_end|>",
    "<|start_header_id|>",
    "<|end_header_id|>",
    "<|eot_id|>",
    "[INST]",
    "[/INST]",
]
_TEXT = [
    f"The quick brown fox number {n} jumps over {n * 7} lazy dogs, doesn't it? 你好，世界！ Привет мир {n}. naïve café\n"
    for n in range(200)
]
SAMPLES = [
    "Hello world", " leading space", "tabs\tand\nlines\n\n", "你好，世界！今天天气很好。", "emoji 🎉👩‍👩‍👧 end", "naïve café ﬁ",
    "a" * 50, "", " ", "   ", "Zażółć gęślą jaźń", "\U0001f600\U0001f600\U0001f600", "<think>plain</think> mixed ▁ Ġ",
]  # fmt: skip


@functools.cache
def byte_level(special: tuple[str, ...] = tuple(SPECIAL)) -> Tokenizer:
    """As in GPT-2, Llama 3 and Qwen: every byte has a token, any cut through a character is possible."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    tokenizer.add_tokens(["<think>", AddedToken("two words", normalized=False), "añadido"])
    return tokenizer


@functools.cache
def byte_fallback() -> Tokenizer:
    """As in Llama 2 and Mistral: BPE over sentencepiece's space mark, bytes for what is not in the vocabulary."""
    base = Tokenizer(models.BPE())
    base.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], limit_alphabet=60, show_progress=False
    )
    base.train_from_iterator(_TEXT, trainer)
    spec = json.loads(base.to_str())
    vocab = spec["model"]["vocab"]
    for byte in range(256):
        vocab[f"<0x{byte:02X}>"] = len(vocab)
    spec["model"] |= {"byte_fallback": True, "unk_token": "<unk>", "fuse_unk": True}
    spec["decoder"] = {
        "type": "Sequence",
        "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"},
            {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ],
    }
    return Tokenizer.from_str(json.dumps(spec))


@functools.cache
def unigram() -> Tokenizer:
    """As in T5 or XLNet: Unigram with Metaspace."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=300, special_tokens=["<unk>", *SPECIAL], unk_token="<unk>", show_progress=False
    )
    tokenizer.train_from_iterator(_TEXT, trainer)
    return tokenizer


@functools.cache
def with_decoder(kind: str) -> Tokenizer:
    """The Unigram vocabulary under another decoder."""
    tokenizer = Tokenizer.from_str(unigram().to_str())
    tokenizer.decoder = {
        "wordpiece": decoders.WordPiece("▁", True),
        "wordpiece_raw": decoders.WordPiece("▁", False),
        "bpe": decoders.BPEDecoder("e"),
        "ctc": decoders.CTC(),
        "never": decoders.Metaspace(prepend_scheme="never"),
        "late_replace": decoders.Sequence([decoders.Fuse(), decoders.Replace("▁", " ")]),
        "none": None,
    }[kind]
    return tokenizer


ALL = {
    "byte_level": byte_level, "byte_fallback": byte_fallback, "unigram": unigram,
    **{
        kind: functools.partial(with_decoder, kind)
        for kind in ("wordpiece", "wordpiece_raw", "bpe", "ctc", "never", "late_replace", "none")
    },
}  # fmt: skip


def with_bos(tokenizer: Tokenizer, bos: str = "<s>") -> Tokenizer:
    """A copy whose post-processor puts BOS before the text."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.post_processor = processors.TemplateProcessing(
        single=[bos, "$A"], special_tokens=[(bos, copy.token_to_id(bos))]
    )
    return copy


def model_dir(path: Path, tokenizer: Tokenizer | None = None, **files: Any) -> Path:
    """A model directory without weights. `files`: JSON content by name without `.json`; None leaves the file out."""
    path.mkdir(parents=True, exist_ok=True)
    defaults: dict[str, Any] = {"config": {"vocab_size": 512, "max_position_embeddings": 2048, "eos_token_id": 1}}
    if tokenizer is not None:
        tokenizer.save(str(path / "tokenizer.json"))
        defaults["tokenizer_config"] = {
            "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>",
        }  # fmt: skip
    for name, content in (defaults | files).items():
        if content is not None:
            (path / f"{name}.json").write_text(json.dumps(content, ensure_ascii=False))
    return path
