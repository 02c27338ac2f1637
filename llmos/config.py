"""Configuration of the daemon: one TOML file, one frozen dataclass per table, one metadata entry per key.

Units, ranges and defaults stand beside the keys here and nowhere else; the commented `llmosd.toml` is printed
from them. Invariant: a `Config` that `load_config` returned is complete and in range; paths in it are absolute.
"""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from llmos.errors import ConfigError
from llmos.http_place import parse_http_address
from llmos.log import LEVELS
from llmos.protocol.limits import (
    MAX_CLIENT_MESSAGE_BYTES,
    MAX_CLIENTS,
    MAX_IN_FLIGHT_PER_CLIENT,
    MAX_KV_PAGES,
    MAX_MODEL_NAME_CHARS,
)
from llmos.tcp_address import parse_address
from llmos.toml_tables import Problems, key, locate, nearest, read_table, render_table, required

EMBEDDED_MODEL = "demo"
MAX_MEMORY_MIB = 16_777_216
_MODEL_NAME = re.compile(rf"[A-Za-z0-9][A-Za-z0-9._:/+-]{{0,{MAX_MODEL_NAME_CHARS - 1}}}")


@dataclass(frozen=True)
class DaemonConfig:
    """The supervisor llmosd."""

    run_dir: str = key(
        "",
        'Folder of sockets and lock. "" = $LLMOS_RUN_DIR, else $XDG_RUNTIME_DIR/llmosd, else /run/llmosd for root, '
        "else /tmp/llmosd-UID.",
    )
    log_level: str = key("info", "Least important record that is written to stderr.", choices=LEVELS)
    start_timeout_s: float = key(
        120.0, "Longest time from start to ready, for each process.", unit="seconds", low=0.1, high=86_400
    )
    hang_timeout_s: float = key(
        5.0,
        "A process whose work loop gives no sign of life for so long is killed and replaced.",
        unit="seconds",
        low=1,
        high=3600,
    )
    stop_timeout_s: float = key(
        10.0, "Grace time of each process between the request to stop and SIGKILL.", unit="seconds", low=0, high=3600
    )
    drain_s: float = key(
        10.0,
        "How long what runs may go on after the first request to stop, while nothing new is taken; the rest goes on at the next start.",
        unit="seconds",
        low=0,
        high=86_400,
    )


@dataclass(frozen=True)
class MicrokernelConfig:
    """The scheduler."""

    max_rows: int = key(256, "Most sequences that run at once, per model.", unit="sequences", low=1, high=4096)
    max_step_tokens: int = key(
        2048,
        "Token budget of one step: decode tokens and prefill chunks together.",
        unit="tokens",
        low=1,
        high=1_048_576,
    )
    max_waiting: int = key(
        100_000, "Most sequences that wait; more are refused as overloaded.", unit="sequences", low=0, high=10_000_000
    )
    steps_in_flight: int = key(
        2, "Steps given to an executor before the first one's result must be back.", unit="steps", low=1, high=8
    )
    ageing_s: float = key(
        30.0,
        "A waiting sequence moves up one of five priority classes each time it waited this long.",
        unit="seconds",
        low=0.01,
        high=86_400,
    )
    policy: str = key(
        "fair",
        "Who runs next: fair = priority classes with ageing, then weighted fair share between tenants; fcfs = first come, "
        "first served.",
        choices=("fair", "fcfs"),
    )
    target_step_ms: float = key(
        100.0,
        "Prompts are computed in pieces such that a step beside running streams takes about this long; 0 = no limit but "
        "max_step_tokens.",
        unit="milliseconds",
        low=0,
        high=60_000,
    )
    prefix_cache: bool = key(True, "Keep pages of ended sequences and reuse them where a prompt begins alike.")
    prefix_sharing: str = key(
        "tenant",
        "Who may reuse a page: tenant = only the tenant that computed it; all = everybody (the time to the first token then "
        "tells what others asked).",
        choices=("tenant", "all"),
    )
    retention_s: float = key(
        600.0,
        "How long an ended sequence's output can still be read.",
        unit="seconds",
        low=0,
        high=604_800,
    )
    idle_timeout_s: float = key(
        3600.0, "An open sequence that nobody used for so long is ended.", unit="seconds", low=1, high=31_536_000
    )
    linger_s: float = key(
        30.0,
        "How long a sequence whose gateway died goes on before somebody reads it again.",
        unit="seconds",
        low=0,
        high=86_400,
    )
    journal: str = key(
        "process",
        "What accepted sequences survive: process = kill -9 of any process; interval, always = also a crash of the machine, but "
        "for the last journal_interval_ms, or nothing; off = not even a restart of the microkernel.",
        choices=("process", "interval", "always", "off"),
    )
    journal_interval_ms: float = key(
        50.0, "How often the journal is flushed, if it is flushed by interval.", unit="milliseconds", low=1, high=60_000
    )
    journal_reserve_mib: float = key(
        64.0,
        "Disk space kept back for the journal, so that sequences that run when the disk gets full can be written to their end; with "
        "less than this left, no new ones are taken. 0 = none.",
        unit="MiB",
        low=0,
        high=65_536,
    )
    recorder_mib: float = key(
        16.0, "Memory for the flight recorder of scheduling decisions; 0 = off.", unit="MiB", low=0, high=4096
    )
    client_window_tokens: int = key(
        4096,
        "Output tokens that a client may leave unread before its sequence is descheduled.",
        unit="tokens",
        low=512,  # twice what our SDK reads before it acknowledges
        high=16_777_216,
    )


@dataclass(frozen=True)
class ModelConfig:
    """A served model; repeat the table for more. Without any, the embedded demonstration model is served."""

    name: str = required("Name that clients ask for. It must be unique.")
    path: str = key(
        "",
        'Hugging Face directory (config.json, tokenizer, safetensors), relative to this file. "" = the embedded model, '
        'only for the name "demo".',
    )
    backend: str = key(
        "auto",
        "What computes: cuda = an NVIDIA GPU, cpu = torch on the processor, fake = no model, for tests; auto = cuda where torch finds a "
        "GPU, else cpu.",
        choices=("auto", "cpu", "cuda", "fake"),
    )
    dtype: str = key(
        "auto",
        "Number format of weights and KV cache; auto = bfloat16 on a GPU, else as the checkpoint says.",
        choices=("auto", "float32", "bfloat16", "float16"),
    )
    weights: str = key(
        "as_is",
        "How weight matrices are kept on the processor: as_is = in dtype; int8, int4 = rounded at load, for half or a quarter of the "
        "memory of bfloat16 and a little less quality.",
        choices=("as_is", "int8", "int4"),
    )
    page_size: int = key(0, "KV cache page; 0 = 64 on a GPU, else 16.", unit="tokens", low=0, high=1024)
    num_pages: int = key(
        0, "KV cache pages; 0 = as many as kv_cache_gib holds.", unit="pages", low=0, high=MAX_KV_PAGES
    )
    kv_cache_gib: float = key(
        0.0,
        "Memory for the KV cache, where num_pages is 0; 0 = on a GPU what memory_share leaves, else 1 GiB.",
        unit="GiB",
        low=0,
        high=65_536,
    )
    memory_share: float = key(
        0.9,
        "Share of the GPU's memory that is free after the weights, to be used if kv_cache_gib is 0.",
        low=0.01,
        high=1,
    )
    host_cache_gib: float = key(
        0.0,
        "Memory for pages that are swapped out of the KV cache; 0 = none, they are recomputed.",
        unit="GiB",
        low=0,
        high=65_536,
    )
    max_context: int = key(
        0, "Longest prompt and output together; 0 = what the model was made for.", unit="tokens", low=0, high=16_777_216
    )
    deterministic: bool = key(
        False,
        "On a GPU: the same tokens and log-probabilities whatever else is in the batch, however a prompt is cut, and after preemption; "
        "prompts take longer.",
    )
    threads: int = key(0, "Processor threads of the executor; 0 = physical cores.", unit="threads", low=0, high=1024)


@dataclass(frozen=True)
class TokenizerConfig:
    """The tokenizer."""

    memory_mib: int = key(
        4096,
        "Most memory of the process; it is replaced if it needs more. 0 = no limit.",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
    )


@dataclass(frozen=True)
class StorageConfig:
    """The model registry."""

    state_dir: str = key(
        "",
        'Folder of what survives a restart. "" = $LLMOS_STATE_DIR, else /var/lib/llmos for root, else '
        "$XDG_STATE_HOME/llmos or ~/.local/state/llmos.",
    )


@dataclass(frozen=True)
class GatewayConfig:
    """The client port."""

    max_clients: int = key(MAX_CLIENTS, "Most connected clients.", unit="clients", low=1, high=65_536)
    max_in_flight_per_client: int = key(
        MAX_IN_FLIGHT_PER_CLIENT,
        "Most requests of one client that have not ended.",
        unit="requests",
        low=1,
        high=1_048_576,
    )
    memory_mib: int = key(
        1024,
        "Most memory of the process; it is replaced if it needs more. 0 = no limit.",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
    )
    tcp: str = key(
        "",
        'Network address of the clients\' port, as in "127.0.0.1:5820" or "[::1]:5820"; control goes over the port after it. '
        '"" = none. Needs a key: llmosctl keys add.',
    )
    audit_log: bool = key(
        True, "Write down who changed what, and who was refused, in audit.log in the state directory."
    )


@dataclass(frozen=True)
class HttpConfig:
    """HTTP: the OpenAI and Anthropic protocols, and llmos's own verbs."""

    enabled: bool = key(
        True, "Serve HTTP. Every request needs a key; the first start makes one for this machine's user."
    )
    address: str = key(
        "",
        'Where, as in "127.0.0.1:5822". "" = that, or any free port if somebody has it. An address that others can reach needs '
        "a key (llmosctl keys add), and tls_cert or behind_proxy.",
    )
    workers: int = key(1, "Processes that serve it.", unit="processes", low=1, high=64)
    tls_cert: str = key("", "File with the certificate (PEM), relative to this file; then tls_key is needed, too.")
    tls_key: str = key("", "File with the certificate's private key (PEM).")
    behind_proxy: bool = key(
        False,
        "Others reach the address through a proxy only, which encrypts; llmos itself then may serve plain HTTP on it.",
    )
    max_body_mib: float = key(
        10.0, "Largest body of a request.", unit="MiB", low=0.001, high=MAX_CLIENT_MESSAGE_BYTES / 2**20
    )
    max_connections: int = key(
        2048, "Most connections of one worker; more are answered with 503.", unit="connections", low=1, high=60_000
    )
    memory_mib: int = key(
        1024,
        "Most memory of one worker; it is replaced if it needs more. 0 = no limit.",
        unit="MiB",
        low=0,
        high=MAX_MEMORY_MIB,
    )


@dataclass(frozen=True)
class Config:
    """The whole file."""

    daemon: DaemonConfig = DaemonConfig()
    microkernel: MicrokernelConfig = MicrokernelConfig()
    models: tuple[ModelConfig, ...] = (ModelConfig(EMBEDDED_MODEL),)
    tokenizer: TokenizerConfig = TokenizerConfig()
    storage: StorageConfig = StorageConfig()
    gateway: GatewayConfig = GatewayConfig()
    http: HttpConfig = HttpConfig()


_TABLES: dict[str, type] = {
    "daemon": DaemonConfig,
    "microkernel": MicrokernelConfig,
    "tokenizer": TokenizerConfig,
    "storage": StorageConfig,
    "gateway": GatewayConfig,
    "http": HttpConfig,
}


def load_config(path: Path | None) -> Config:
    """Read a file, None = built-in defaults. `ConfigError` names each problem: file, line, key, nearest valid key."""
    if path is None:
        return Config()
    try:
        text = path.read_bytes().decode()
        raw = tomllib.loads(text)
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}", field="config") from None
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 text: {error}", field="config") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not TOML: {error}", field="config") from None
    return _build(raw, Problems(str(path), locate(text)), path.absolute().parent)


def _build(raw: dict[str, Any], problems: Problems, base: Path) -> Config:
    valid = [*_TABLES, "models"]
    for name in raw:
        if name not in valid:
            line_key = (name, 0, "") if (name, 0, "") in problems.lines else ("", 0, name)
            problems.add(*line_key, f"unknown table [{name}]; {nearest(name, valid)}")
    tables: dict[str, Any] = {name: read_table(cls, raw.get(name, {}), problems, name) for name, cls in _TABLES.items()}
    config = Config(**tables, models=_models(raw.get("models"), problems, base))
    try:
        parse_address(config.gateway.tcp)
    except ConfigError as error:
        problems.add("gateway", 0, "tcp", error.message)
    try:
        parse_http_address(config.http.address)
    except ConfigError as error:
        problems.add("http", 0, "address", error.message)
    if bool(config.http.tls_cert) != bool(config.http.tls_key):
        problems.add("http", 0, "tls_cert", "http.tls_cert and http.tls_key belong together: one of them is missing")
    if problems.found:
        raise ConfigError(problems.text(), field=problems.first_key)
    return replace(
        config,
        daemon=replace(config.daemon, run_dir=_absolute(config.daemon.run_dir, base)),
        storage=replace(config.storage, state_dir=_absolute(config.storage.state_dir, base)),
        http=replace(
            config.http,
            tls_cert=_absolute(config.http.tls_cert, base),
            tls_key=_absolute(config.http.tls_key, base),
        ),
    )


def _absolute(path: str, base: Path) -> str:
    """A path of the file, relative to the file's folder; "" stays what it means."""
    return str(base / Path(path).expanduser()) if path else ""


def _models(raw: Any, problems: Problems, base: Path) -> tuple[ModelConfig, ...]:
    if raw is None:
        return (ModelConfig(EMBEDDED_MODEL),)
    if not isinstance(raw, list) or not raw:
        problems.add("models", 0, "", "models must be one or more [[models]] tables, in double brackets")
        return ()
    found: dict[str, int] = {}
    models = []
    for index, entry in enumerate(raw):
        model = read_table(ModelConfig, entry, problems, "models", index)
        if model.name and not _MODEL_NAME.fullmatch(model.name):
            problems.add(
                "models",
                index,
                "name",
                f"models.name: {model.name!r} needs 1 to {MAX_MODEL_NAME_CHARS} letters, digits or ._:/+-",
            )
        elif model.name and model.name in found:
            first = problems.lines.get(("models", found[model.name], "name"), 1)
            problems.add(
                "models", index, "name", f"models.name: {model.name!r} is already the name of the model at line {first}"
            )
        found.setdefault(model.name, index)
        if not model.path and model.name not in ("", EMBEDDED_MODEL):
            problems.add(
                "models",
                index,
                "path",
                f"models.path: model {model.name!r} needs a path; only {EMBEDDED_MODEL!r} is embedded",
            )
        models.append(replace(model, path=_absolute(model.path, base)))
    return tuple(models)


def model_path(model: ModelConfig) -> Path:
    """The model's directory; the embedded model lies in the package."""
    return Path(model.path) if model.path else Path(__file__).parent / "assets" / "demo-model"


def state_dir(storage: StorageConfig) -> Path:
    """Where state that survives a restart lives; not created here."""
    if storage.state_dir:
        return Path(storage.state_dir).absolute()
    if chosen := os.environ.get("LLMOS_STATE_DIR"):
        return Path(chosen).absolute()
    if os.geteuid() == 0:
        return Path("/var/lib/llmos")
    base = os.environ.get("XDG_STATE_HOME")
    return (Path(base) if base else Path.home() / ".local" / "state") / "llmos"


def render_config() -> str:
    """The commented configuration file with every key at its default; `llmosd.toml` in the repository is this text."""
    lines = [
        "# Configuration of llmosd: every key with its meaning, unit, range and default.",
        "# Keys that are left out keep their default.",
        "# Check an edited file with `llmosd --config FILE --check`; `llmosd --print-config` prints this text.",
        "",
    ]
    for name, cls in _TABLES.items():
        if cls.__dataclass_fields__:  # type: ignore[attr-defined]
            lines += render_table(cls, name)
    lines += render_table(ModelConfig, "models", array=True, values={"name": EMBEDDED_MODEL})
    return "\n".join(lines).rstrip() + "\n"
