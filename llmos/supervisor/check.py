"""What can be said about a configuration without starting anything: do the models' directories look like models, is there a key for the
network port?
"""

from __future__ import annotations

from pathlib import Path

from llmos.config import Config, ModelConfig, model_path, state_dir
from llmos.errors import ConfigError, ModelError
from llmos.http_place import is_loopback, parse_http_address
from llmos.keys.keyfile import KeyFile
from llmos.keys.server_key import read_server_key
from llmos.tcp_address import parse_address


def check_models(config: Config) -> list[str]:
    """One line per model; raises `ModelError` with one line per problem. The executor later looks inside the files."""
    problems = [problem for model in config.models if (problem := _problem(model, model_path(model))) is not None]
    if problems:
        raise ModelError("\n".join(problems), field="models.path")
    return [f"model {model.name}: {model_path(model)}" for model in config.models]


def _problem(model: ModelConfig, path: Path) -> str | None:
    if model.backend == "fake" and not model.path:
        return None
    if not path.is_dir():
        return f"model {model.name}: no directory {path}"
    if model.backend == "fake":
        return None
    if not (path / "config.json").is_file():
        return f"model {model.name}: {path} has no config.json"
    if not any(path.glob("*.safetensors")):
        return f"model {model.name}: {path} has no *.safetensors (other formats can carry code)"
    return None


def check_door(config: Config) -> list[str]:
    """One line on the network port, if there is to be one; raises `ConfigError` if nobody could come in, or anybody."""
    if parse_address(config.gateway.tcp) is None:
        return []
    folder = state_dir(config.storage)
    keys = KeyFile(folder)
    live = sum(key.revoked is None for key in keys.read())
    if not live:
        text = f"gateway.tcp is set, but {keys.path} has no live key; make one: llmosctl keys add NAME --tenant TENANT"
        raise ConfigError(text, field="gateway.tcp")
    if read_server_key(folder) is None:
        raise ConfigError(
            f"gateway.tcp is set, but {folder} has no server.key; make it: llmosctl keys server", field="gateway.tcp"
        )
    return [f"network port {config.gateway.tcp}: {live} live keys"]


def check_http(config: Config) -> list[str]:
    """One line on HTTP, if it is served; raises `ConfigError` if others could reach it without a key or in plain text."""
    http = config.http
    if not http.enabled:
        return []
    for name, path in (("tls_cert", http.tls_cert), ("tls_key", http.tls_key)):
        if path and not Path(path).is_file():
            raise ConfigError(f"http.{name}: no file {path}", field=f"http.{name}")
    address = parse_http_address(http.address)
    where = f"{address.shown}:{address.port}"
    if is_loopback(address):
        return [f"HTTP on {where}, for this machine"]
    keys = KeyFile(state_dir(config.storage))
    live = sum(key.revoked is None for key in keys.read())
    if not live:
        raise ConfigError(
            f"http.address {where} can be reached by others, but {keys.path} has no live key; make one: "
            "llmosctl keys add NAME --tenant TENANT",
            field="http.address",
        )
    if not http.tls_cert and not http.behind_proxy:
        raise ConfigError(
            f"http.address {where} can be reached by others, and keys would cross the network in plain text; set http.tls_cert "
            "and http.tls_key, or http.behind_proxy = true if a proxy in front encrypts",
            field="http.address",
        )
    return [f"HTTP on {where}: {live} live keys, {'TLS' if http.tls_cert else 'behind a proxy'}"]
