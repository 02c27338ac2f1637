"""How the families name the same tensors. `{i}` is the number of a layer."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Names:
    """`prefix`: what stands before all names where the model has a head. `head`: (name of the layer before the last, of the last)."""

    prefix: str
    layers: str
    query: str
    key: str
    value: str
    attention_out: str
    attention_norm: str
    up: str
    down: str
    output_norm: str
    head: tuple[str, str]


_BERT_LAYER = {
    "layers": "encoder.layer.{i}.",
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "attention_out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "output_norm": "output.LayerNorm",
}
_ROBERTA = Names(prefix="roberta.", **_BERT_LAYER, head=("classifier.dense", "classifier.out_proj"))
NAMES = {
    "bert": Names(prefix="bert.", **_BERT_LAYER, head=("bert.pooler.dense", "classifier")),
    "roberta": _ROBERTA,
    "xlm-roberta": _ROBERTA,
    "camembert": _ROBERTA,
    "distilbert": Names(
        prefix="distilbert.",
        layers="transformer.layer.{i}.",
        query="attention.q_lin",
        key="attention.k_lin",
        value="attention.v_lin",
        attention_out="attention.out_lin",
        attention_norm="sa_layer_norm",
        up="ffn.lin1",
        down="ffn.lin2",
        output_norm="output_layer_norm",
        head=("pre_classifier", "classifier"),
    ),
    "mpnet": Names(
        prefix="mpnet.",
        layers="encoder.layer.{i}.",
        query="attention.attn.q",
        key="attention.attn.k",
        value="attention.attn.v",
        attention_out="attention.attn.o",
        attention_norm="attention.LayerNorm",
        up="intermediate.dense",
        down="output.dense",
        output_norm="output.LayerNorm",
        head=("classifier.dense", "classifier.out_proj"),
    ),
}
# Parts that other tasks need and ours do not.
UNUSED = ("cls.", "lm_head.", "vocab_transform.", "vocab_layer_norm.", "vocab_projector.")
UNUSED_PARTS = ("pooler.dense.weight", "pooler.dense.bias", "embeddings.position_ids", "embeddings.token_type_ids")
