"""Every way a model directory can be wrong: a `ModelError` that names file and problem, and never anything else."""

from __future__ import annotations

import functools
import json
import shutil
import struct
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from small_models import make_model

from llmos.config import ModelConfig
from llmos.errors import ConfigError, ModelError
from llmos.services.executor.backend import Limits
from llmos.services.executor.checkpoint import Checkpoint
from llmos.services.executor.cpu import CpuBackend
from llmos.services.executor.models.decoder import Decoder
from llmos.services.executor.spec import limit_context, read_spec

pytestmark = pytest.mark.slow


@functools.cache
def original(kind: str, max_shard_size: str = "1GB") -> Path:
    directory = Path(tempfile.mkdtemp(prefix="llmos-test-"))
    make_model(kind, directory, max_shard_size=max_shard_size)
    return directory


@pytest.fixture(scope="module", autouse=True)
def _remove_originals():
    yield
    for kind, size in (("llama3-rope-untied", "1GB"), ("qwen2", "1GB"), ("llama3-rope-untied", "30KB")):
        shutil.rmtree(original(kind, size))
    original.cache_clear()


def copy_of(tmp_path: Path, kind: str = "llama3-rope-untied", max_shard_size: str = "1GB") -> Path:
    return Path(shutil.copytree(original(kind, max_shard_size), tmp_path / "model"))


def load(directory: Path, **changes) -> CpuBackend:
    config = ModelConfig(name="m", backend="cpu", threads=1, **{"num_pages": 4} | changes)
    return CpuBackend.open(config, directory, Limits(2, 64), lambda: None)


def refused(directory: Path) -> str:
    with pytest.raises(ModelError) as caught:
        load(directory)
    return caught.value.message


def edit_config(directory: Path, **changes) -> None:
    """Set keys of config.json; `...` removes one."""
    path = directory / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def edit_weights(directory: Path, **changes) -> None:
    """Set tensors of model.safetensors; `...` removes one. Dots are written as double underscores."""
    path = directory / "model.safetensors"
    tensors = load_file(path) | {name.replace("__", "."): value for name, value in changes.items()}
    save_file({name: value for name, value in tensors.items() if value is not ...}, path)


def test_the_original_loads(tmp_path):
    assert load(copy_of(tmp_path)).capabilities.vocab_size == 160


def test_missing_directory(tmp_path):
    assert refused(tmp_path / "nowhere") == f"{tmp_path}/nowhere: no such model directory"


def test_missing_config(tmp_path):
    directory = copy_of(tmp_path)
    (directory / "config.json").unlink()
    assert refused(directory) == f"{directory}/config.json: no such file"


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not valid JSON"),
        (b"{'a': 1}", "not valid JSON"),
        (b"[1]", "holds a JSON list, not an object"),
        (b"\xff\xfe\x00", "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
    ],
)
def test_config_that_is_no_json_object(tmp_path, content, problem):
    directory = copy_of(tmp_path)
    (directory / "config.json").write_bytes(content)
    assert f"config.json: {problem}" in refused(directory)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "'GPT2LMHeadModel' is not supported; supported: LlamaForCausalLM, "
         "MistralForCausalLM, Qwen2ForCausalLM, Qwen3ForCausalLM"),
        ({"architectures": ..., "model_type": "mamba"}, "model_type: 'mamba' is not supported; supported: LlamaForCausalLM"),
        ({"architectures": ..., "model_type": ...}, "model_type: is missing"),
        ({"architectures": "LlamaForCausalLM"}, "architectures: is not a list of strings"),
        ({"hidden_size": ...}, "hidden_size: is missing"),
        ({"hidden_size": ..., "hiden_size": 48}, "hidden_size: is missing; did you mean it by 'hiden_size'?"),
        ({"num_key_value_heads": ..., "num_key_value_head": 2}, "num_key_value_head: unknown key; did you mean 'num_key_value_heads'?"),
        ({"hidden_size": "48"}, "hidden_size: '48' is not a whole number"),
        ({"hidden_size": True}, "hidden_size: True is not a whole number"),
        ({"hidden_size": -48}, "hidden_size: -48 is outside"),
        ({"hidden_size": 10**15}, "hidden_size: 1000000000000000 is outside"),
        ({"hidden_size": 50, "head_dim": None}, "hidden_size: 50 is not a multiple of num_attention_heads (4)"),
        ({"num_attention_heads": 5, "head_dim": 12}, "num_key_value_heads: num_attention_heads (5) is not a multiple of 2"),
        ({"head_dim": 11}, "head_dim: 11 is odd"),
        ({"num_hidden_layers": 10**6}, "num_hidden_layers: 1000000 is outside"),
        ({"rms_norm_eps": 0}, "rms_norm_eps: 0 is outside"),
        ({"hidden_act": "gelu"}, "hidden_act: 'gelu' is not supported, only 'silu'"),
        ({"tie_word_embeddings": "no"}, "tie_word_embeddings: 'no' is not true or false"),
        ({"quantization_config": {"bits": 4}}, "quantization_config: this setting is not supported"),
        ({"dtype": "int8"}, "dtype: 'int8' is not supported; supported: float32, bfloat16, float16"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type: 'dynamic' is not supported; supported: default"),
        ({"rope_parameters": ..., "rope_scaling": {"type": "longrope"}}, "rope_scaling: rope_type: 'longrope' is not supported"),
        ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "rope_parameters: low_freq_factor: is missing"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_parameters: factor: is missing"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("nan")}}, "factor: nan is outside"),
        ({"rope_parameters": "linear"}, "rope_parameters: is not an object"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor: only 1.0 is supported"),
    ],
)  # fmt: skip
def test_config_that_makes_no_sense(tmp_path, changes, problem):
    directory = copy_of(tmp_path)
    edit_config(directory, **changes)
    message = refused(directory)
    assert message.startswith(f"{directory}/config.json: ")
    assert problem in message


def test_layer_types_that_do_not_fit(tmp_path):
    directory = copy_of(tmp_path, "qwen2")
    edit_config(directory, layer_types=["full_attention"])
    assert "layer_types: has 1 entries for 3 layers" in refused(directory)
    edit_config(directory, layer_types=["full_attention", "chunked_attention", "full_attention"])
    assert "layer_types: 'chunked_attention' is not supported" in refused(directory)


def test_old_and_new_rope_settings_read_alike(tmp_path):
    directory = copy_of(tmp_path)
    new = read_spec(directory)
    assert new.rope.kind == "llama3"
    table = json.loads((directory / "config.json").read_text())["rope_parameters"]
    theta = table.pop("rope_theta")
    table["type"] = table.pop("rope_type")
    edit_config(directory, rope_parameters=..., rope_scaling=table, rope_theta=theta)
    assert read_spec(directory) == new


def test_context_longer_than_the_models_is_refused(tmp_path):
    spec = read_spec(copy_of(tmp_path))
    assert limit_context(spec, 0) == 512
    assert limit_context(spec, 100) == 100
    with pytest.raises(ModelError, match="max_context 513 is over the model's own context of 512"):
        limit_context(spec, 513)


def test_cache_too_small_for_a_page(tmp_path):
    with pytest.raises(ConfigError, match="kv_cache_gib: 1e-06 GiB holds no page"):
        load(copy_of(tmp_path), num_pages=0, kv_cache_gib=1e-6)
    pages = load(copy_of(tmp_path / "again"), num_pages=0, kv_cache_gib=0.001).capabilities.num_pages
    assert pages == int(0.001 * 2**30) // (3 * 2 * 2 * 16 * 16 * 4), "layers, K and V, heads, page, head_dim, bytes"


def test_cache_larger_than_memory(tmp_path):
    with pytest.raises(ConfigError, match="2147483647 pages of KV cache do not fit in memory"):
        load(copy_of(tmp_path), num_pages=2**31 - 1)


def test_host_cache_too_small_for_a_page(tmp_path):
    with pytest.raises(ConfigError, match="host_cache_gib: 1e-06 GiB holds no page") as caught:
        load(copy_of(tmp_path), host_cache_gib=1e-6)
    assert caught.value.field == "host_cache_gib"
    capabilities = load(copy_of(tmp_path / "again"), host_cache_gib=0.001).capabilities
    assert capabilities.host_pages == int(0.001 * 2**30) // (3 * 2 * 2 * 16 * 16 * 4)
    assert 0.0 < capabilities.swap_us < 1e4


def test_host_cache_larger_than_memory(tmp_path):
    with pytest.raises(ConfigError, match="4194304 host pages do not fit in memory") as caught:
        load(copy_of(tmp_path), host_cache_gib=65_536, page_size=1024)
    assert caught.value.field == "host_cache_gib"


def test_no_weights(tmp_path):
    directory = copy_of(tmp_path)
    (directory / "model.safetensors").unlink()
    assert refused(directory) == f"{directory}: neither model.safetensors nor model.safetensors.index.json is there"
    (directory / "pytorch_model.bin").touch()
    assert refused(directory).endswith("weights in pickle form (*.bin) are not read")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.gguf", "model.ckpt"])
def test_other_formats_are_not_looked_at(tmp_path, name):
    """A pickle that runs code when it is opened: it is not."""
    directory = copy_of(tmp_path)
    (directory / "model.safetensors").unlink()
    ran = tmp_path / "ran"
    (directory / name).write_bytes(f"cos\nmkdir\n(S'{ran}'\ntR.".encode())
    assert "neither model.safetensors nor model.safetensors.index.json is there" in refused(directory)
    (directory / name).rename(directory / "model.safetensors")
    assert "not a safetensors file" in refused(directory)
    assert not ran.exists()


def test_a_header_too_long(tmp_path):
    path = tmp_path / "model.safetensors"
    length = 32 * 1024 * 1024 + 1
    with path.open("wb") as file:
        file.write(struct.pack("<Q", length))
        file.truncate(8 + length)
    with pytest.raises(ModelError, match=f"header length {length} in a file of {length + 8} bytes"):
        Checkpoint(tmp_path)


def test_a_model_with_code_of_its_own(tmp_path):
    directory = copy_of(tmp_path)
    edit_config(directory, auto_map={"AutoModelForCausalLM": "modeling_evil.EvilForCausalLM"})
    (directory / "modeling_evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    assert (
        refused(directory)
        == f"{directory}/config.json: auto_map: the model brings code of its own, which llmos does not run"
    )
    assert not (tmp_path / "ran").exists()


def test_missing_shard(tmp_path):
    directory = copy_of(tmp_path, max_shard_size="30KB")
    shard = sorted(directory.glob("model-*.safetensors"))[1]
    shard.unlink()
    assert refused(directory) == f"{shard}: no such file, but model.safetensors.index.json names it"


@pytest.mark.parametrize(
    ("weight_map", "problem"),
    [
        (None, "weight_map: is missing or empty"),
        ({}, "weight_map: is missing or empty"),
        ({"a": "../other.safetensors"}, "weight_map: '../other.safetensors' is not a file name"),
        ({"a": 7}, "weight_map: 7 is not a file name"),
        ({"a": ["x"]}, "is not a file name"),
    ],
)
def test_bad_index(tmp_path, weight_map, problem):
    directory = copy_of(tmp_path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    assert problem in refused(directory)


def test_missing_tensor(tmp_path):
    directory = copy_of(tmp_path)
    edit_weights(directory, model__layers__1__mlp__up_proj__weight=...)
    assert refused(directory).endswith(
        "tensor 'model.layers.1.mlp.up_proj.weight' is missing from the safetensors files"
    )


def test_wrong_shape(tmp_path):
    directory = copy_of(tmp_path)
    edit_weights(directory, model__norm__weight=torch.ones(47))
    expected = "model.safetensors: tensor 'model.norm.weight' has shape [47], config.json asks for [64]"
    assert refused(directory).endswith(expected)


def test_integer_weights(tmp_path):
    directory = copy_of(tmp_path)
    edit_weights(directory, model__norm__weight=torch.ones(64, dtype=torch.int8))
    assert "tensor 'model.norm.weight' has dtype I8; supported: F32" in refused(directory)


def test_tensor_that_the_config_does_not_know(tmp_path):
    directory = copy_of(tmp_path, "qwen2")
    edit_config(directory, architectures=["LlamaForCausalLM"])
    assert "'model.layers.0.self_attn.k_proj.bias' has no place in the model of config.json" in refused(directory)


def test_missing_untied_head(tmp_path):
    directory = copy_of(tmp_path)
    edit_weights(directory, lm_head__weight=...)
    assert "tensor 'lm_head.weight' is missing" in refused(directory)


def with_header(directory: Path, header: bytes, data: bytes = b"\0" * 16, length: int | None = None) -> None:
    size = struct.pack("<Q", len(header) if length is None else length)
    (directory / "model.safetensors").write_bytes(size + header + data)


@pytest.mark.parametrize(
    ("header", "length", "problem"),
    [
        (b"{}", 10**12, "not a safetensors file: header length 1000000000000"),
        (b"{}", 1, "not a safetensors file: header length 1"),
        (b"{]", None, "the header is not JSON"),
        (b"\xff\xff", None, "the header is not JSON"),
        (b"[]", None, "the header is not an object"),
        (b'{"t": 5}', None, "tensor 't' has a malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [4]}}', None, "tensor 't' has a malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [4], "data_offsets": [0, 17]}}', None, "ends at byte 17 of 16: the file is cut short"),
        (b'{"t": {"dtype": "F32", "shape": [4], "data_offsets": [16, 0]}}', None, "ends at byte 0 of 16"),
        (b'{"t": {"dtype": "F32", "shape": [3], "data_offsets": [0, 16]}}', None, "tensor 't' of shape [3] has 16 bytes"),
        (b'{"t": {"dtype": "F32", "shape": [true, 4], "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": "4", "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [1,1,1,1,1,1,1,1,4], "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [4], "data_offsets": [-16, 0]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]}}', None, "malformed header entry"),
        (b'{"t": {"dtype": "PYOBJ", "shape": [4], "data_offsets": [0, 16]}}', None, "the unknown dtype 'PYOBJ'"),
        (b'{"t": {"dtype": "U8", "shape": [12], "data_offsets": [0, 12]}, "u": {"dtype": "U8", "shape": [8], "data_offsets": [8, 16]}}',
         None, "tensor 'u' begins at byte 8, not 12: it overlaps the one before"),
        (b'{"t": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}, "u": {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]}}',
         None, "it overlaps the one before"),
        (b'{"t": {"dtype": "U8", "shape": [12], "data_offsets": [4, 16]}}', None, "it leaves a hole before it"),
        (b'{"t": {"dtype": "U8", "shape": [12], "data_offsets": [0, 12]}}', None, "4 bytes after the last tensor are no tensor's"),
        (b'{"t": {"dtype": "U8", "shape": [18446744073709551616, 0], "data_offsets": [0, 0]}}', None, "16 bytes after the last"),
        (b"[" * 1_000_000, None, "the header is not JSON"),
    ],
)  # fmt: skip
def test_corrupt_header(tmp_path, header, length, problem):
    with_header(tmp_path, header, length=length)
    with pytest.raises(ModelError) as caught:
        Checkpoint(tmp_path)
    assert f"{tmp_path}/model.safetensors: " in caught.value.message
    assert problem in caught.value.message


@pytest.mark.parametrize("keep", [0, 5, 8, 100, 5000, -1])
def test_truncated_file(tmp_path, keep):
    directory = copy_of(tmp_path)
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    assert str(path) in refused(directory)


@settings(
    max_examples=150, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.integers(0, 4000), st.integers(0, 255))
def test_a_flipped_header_byte_gives_a_model_error_or_loads(tmp_path, place, value):
    raw = bytearray((original("llama3-rope-untied") / "model.safetensors").read_bytes())
    raw[place] = value
    directory = tmp_path / "flipped"
    directory.mkdir(exist_ok=True)
    (directory / "model.safetensors").write_bytes(raw)
    spec = read_spec(original("llama3-rope-untied"))
    problem = ""
    try:
        checkpoint = Checkpoint(directory)
        Decoder(spec, checkpoint, torch.float32, lambda weight, bias: lambda x: x, lambda: None)
        checkpoint.finish()
    except ModelError as error:
        problem = error.message
    assert not problem or str(directory) in problem
