"""What a model is: `config.json` of a Hugging Face directory, read into a frozen `ModelSpec`. Imports no torch.

Invariants: a `ModelSpec` that `read_spec` returned is complete, consistent and of a supported architecture; whatever is wrong with
the file becomes a `ModelError` that names the file, the key and the problem. Nothing in the directory is ever executed.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from llmos.errors import ModelError
from llmos.services.executor.config_fields import ConfigFields

CONFIG_FILE = "config.json"
DTYPES = ("float32", "bfloat16", "float16")
ROPE_KINDS = ("default", "linear", "llama3", "yarn")


@dataclass(frozen=True, slots=True)
class Family:
    """How one architecture differs from the common decoder, and what transformers assumes where config.json is silent."""

    architecture: str
    default_head_dim: int | None = None  # None: hidden_size / num_attention_heads
    qkv_bias: bool | None = None  # None: `attention_bias` decides for q, k, v and o alike
    mlp_bias_key: bool = False
    qk_norm: bool = False
    window_key: str | None = None  # the key that switches sliding windows on; None = `sliding_window` alone


FAMILIES = {
    "llama": Family("LlamaForCausalLM", mlp_bias_key=True),
    "mistral": Family("MistralForCausalLM", qkv_bias=False),
    "qwen2": Family("Qwen2ForCausalLM", qkv_bias=True, window_key="use_sliding_window"),
    "qwen3": Family("Qwen3ForCausalLM", default_head_dim=128, qk_norm=True, window_key="use_sliding_window"),
}


@dataclass(frozen=True, slots=True)
class RopeSpec:
    """Rotary position embedding. Fields beyond `theta` count only for the kinds that use them."""

    kind: str
    theta: float
    factor: float = 1.0
    original_max_positions: int = 0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    attention_factor: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True


@dataclass(frozen=True, slots=True)
class ModelSpec:
    """One decoder-only model. `dtype` is "" if config.json does not say; `windows[i]` is layer i's attention window, 0 = unlimited."""

    architecture: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    norm_eps: float
    max_context: int
    tie_embeddings: bool
    qkv_bias: bool
    o_bias: bool
    mlp_bias: bool
    qk_norm: bool
    rope: RopeSpec
    windows: tuple[int, ...]
    dtype: str

    @property
    def num_groups(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads


def read_spec(directory: Path) -> ModelSpec:
    """Read and check `config.json`; raises `ModelError`."""
    fields = ConfigFields.read(directory, CONFIG_FILE)
    if fields.present("auto_map"):
        raise fields.error("auto_map", "the model brings code of its own, which llmos does not run")
    family = _family(fields)
    spec = _spec(fields, family)
    fields.refuse_typos()
    _check_shapes(fields, spec)
    return spec


def _family(fields: ConfigFields) -> Family:
    supported = ", ".join(sorted(family.architecture for family in FAMILIES.values()))
    architectures = fields.strings("architectures")
    kind = fields.text("model_type", "")
    by_architecture = {family.architecture: family for family in FAMILIES.values()}
    if architectures:
        for name in architectures:
            if name in by_architecture:
                return by_architecture[name]
        raise fields.error("architectures", f"{architectures[0]!r} is not supported; supported: {supported}")
    if kind in FAMILIES:
        return FAMILIES[kind]
    problem = f"{kind!r} is not supported" if kind else "is missing, and so is 'architectures'"
    raise fields.error("model_type", f"{problem}; supported: {supported}")


def _spec(fields: ConfigFields, family: Family) -> ModelSpec:
    fields.require("hidden_act", "silu")
    fields.require("quantization_config", None)
    fields.require("pretraining_tp", 1)
    hidden_size = fields.integer("hidden_size")
    num_heads = fields.integer("num_attention_heads")
    num_layers = fields.integer("num_hidden_layers", high=4096)
    max_context = fields.integer("max_position_embeddings")
    attention_bias = fields.boolean("attention_bias", False) if family.qkv_bias is None else False
    return ModelSpec(
        architecture=family.architecture,
        vocab_size=fields.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=fields.integer("intermediate_size"),
        num_layers=num_layers,
        num_heads=num_heads,
        num_kv_heads=fields.integer("num_key_value_heads", default=num_heads),
        head_dim=_head_dim(fields, family, hidden_size, num_heads),
        norm_eps=fields.number("rms_norm_eps", 1e-6, high=1.0),
        max_context=max_context,
        tie_embeddings=fields.boolean("tie_word_embeddings", False),
        qkv_bias=attention_bias if family.qkv_bias is None else family.qkv_bias,
        o_bias=attention_bias,
        mlp_bias=fields.boolean("mlp_bias", False) if family.mlp_bias_key else False,
        qk_norm=family.qk_norm,
        rope=_rope(fields, max_context),
        windows=_windows(fields, family, num_layers, max_context),
        dtype=_dtype(fields),
    )


def _head_dim(fields: ConfigFields, family: Family, hidden_size: int, num_heads: int) -> int:
    if not fields.present("head_dim"):
        if family.default_head_dim is not None:
            return family.default_head_dim
        if hidden_size % num_heads:
            raise fields.error("hidden_size", f"{hidden_size} is not a multiple of num_attention_heads ({num_heads})")
        return hidden_size // num_heads
    return fields.integer("head_dim", high=4096)


def _dtype(fields: ConfigFields) -> str:
    key = "dtype" if fields.present("dtype") else "torch_dtype"  # transformers 5 and 4
    dtype = fields.text(key, "")
    if dtype and dtype not in DTYPES:
        raise fields.error(key, f"{dtype!r} is not supported; supported: {', '.join(DTYPES)}")
    return dtype


def _windows(fields: ConfigFields, family: Family, num_layers: int, max_context: int) -> tuple[int, ...]:
    """Attention window of each layer. A window as long as the context is no window."""
    window = fields.integer("sliding_window", default=0) if fields.present("sliding_window") else 0
    first = fields.integer("max_window_layers", default=0, low=0) if fields.present("max_window_layers") else 0
    kinds = fields.strings("layer_types")
    if family.window_key is not None and not fields.boolean(family.window_key, False):
        window = 0
    if kinds and len(kinds) != num_layers:
        raise fields.error("layer_types", f"has {len(kinds)} entries for {num_layers} layers")
    if unknown := sorted(set(kinds) - {"full_attention", "sliding_attention"}):
        raise fields.error("layer_types", f"{unknown[0]!r} is not supported")
    if window >= max_context:
        window = 0
    if family.window_key is None:
        return (window,) * num_layers
    sliding = [kind == "sliding_attention" for kind in kinds] or [layer >= first for layer in range(num_layers)]
    return tuple(window if slides else 0 for slides in sliding)


def _rope(fields: ConfigFields, max_context: int) -> RopeSpec:
    """transformers 5 writes one table `rope_parameters`; before, it was `rope_theta` and an optional `rope_scaling`."""
    key = "rope_parameters" if fields.present("rope_parameters") else "rope_scaling"
    rope = fields.table(key)
    theta = rope.number("rope_theta", fields.number("rope_theta", 10000.0, high=1e12), high=1e12)
    kind = rope.text("rope_type", rope.text("type", "default"))
    if kind not in ROPE_KINDS:
        raise rope.error("rope_type", f"{kind!r} is not supported; supported: {', '.join(ROPE_KINDS)}")
    if rope.number("partial_rotary_factor", fields.number("partial_rotary_factor", 1.0)) != 1.0:
        raise rope.error("partial_rotary_factor", "only 1.0 is supported")
    if kind == "default":
        return RopeSpec(kind, theta)
    factor = rope.number("factor", None, high=1e6)
    if kind == "linear":
        return RopeSpec(kind, theta, factor)
    original = rope.integer("original_max_position_embeddings", default=max_context)
    if kind == "llama3":
        low, high = rope.number("low_freq_factor", None), rope.number("high_freq_factor", None)
        if high <= low:
            raise rope.error("high_freq_factor", f"{high} is not above low_freq_factor ({low})")
        return RopeSpec(kind, theta, factor, original, low_freq_factor=low, high_freq_factor=high)
    return RopeSpec(
        kind,
        theta,
        factor,
        original,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        attention_factor=rope.optional_number("attention_factor"),
        mscale=rope.optional_number("mscale"),
        mscale_all_dim=rope.optional_number("mscale_all_dim"),
        truncate=rope.boolean("truncate", True),
    )


def _check_shapes(fields: ConfigFields, spec: ModelSpec) -> None:
    if spec.num_heads % spec.num_kv_heads:
        raise fields.error(
            "num_key_value_heads", f"num_attention_heads ({spec.num_heads}) is not a multiple of {spec.num_kv_heads}"
        )
    if spec.head_dim % 2:
        raise fields.error("head_dim", f"{spec.head_dim} is odd; rotary embeddings need an even size")


def limit_context(spec: ModelSpec, max_context: int) -> int:
    """The context to serve: the model's own, or less if the configuration says so."""
    if max_context > spec.max_context:
        raise ModelError(
            f"max_context {max_context} is over the model's own context of {spec.max_context}", field="max_context"
        )
    return max_context or spec.max_context
