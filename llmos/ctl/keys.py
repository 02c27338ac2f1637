"""`llmosctl keys`: who may come in from the network. Works on the state directory's files, whether llmosd runs or not; a running gateway
notices.

The secret goes to stdout once, as lines for a shell; everything said to people goes to stderr.
"""

from __future__ import annotations

import datetime
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import typer

from llmos.config import GatewayConfig, StorageConfig, load_config, state_dir
from llmos.ctl.arguments import Json, terminal, wants_json
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.render import printable, short, table, write_json
from llmos.keys.keyfile import Key, KeyFile
from llmos.keys.roles import role_of
from llmos.keys.server_key import make_server_key
from llmos.tcp_address import parse_address

app = typer.Typer(help="Keys of clients that come over the network.", epilog=EXIT_HELP, no_args_is_help=True)
Config = Annotated[
    Path | None, typer.Option("--config", help="llmosd's configuration, if it has one.", show_default=False)
]
StateDir = Annotated[
    Path | None,
    typer.Option("--state-dir", help="llmosd's state directory, if it is not the usual one.", show_default=False),
]


@app.command(epilog=EXIT_HELP)
@command
def add(
    context: typer.Context,
    name: Annotated[str, typer.Argument(help="What it is for; only for people.", metavar="NAME")],
    tenant: Annotated[str, typer.Option("--tenant", help="Whose sequences it makes, sees and pays for.")],
    role: Annotated[
        str,
        typer.Option(
            "--role",
            help="submit: make sequences and drive those of its tenant; inspect: also see what runs; admin: everything, of "
            "every tenant.",
        ),
    ] = "submit",
    config: Config = None,
    state: StateDir = None,
    as_json: Json = False,
) -> None:
    """Make a key. Its secret is shown once, as what the client's environment needs: eval "$(llmosctl keys add ...)"."""
    gateway, folder = _found(config, state)
    key, secret = KeyFile(folder).add(name, tenant, role_of(role))
    server = make_server_key(folder).public
    url = _url(gateway)
    if wants_json(context, as_json):
        write_json({**_plain(key), "secret": secret.text, "url": url, "server_key": server})
        return
    sys.stderr.write(f"key {key.id} ({key.role}) of tenant {printable(key.tenant)}; the secret is not kept here\n")
    if not gateway.tcp:
        sys.stderr.write("llmosd has no network port yet: set gateway.tcp in its configuration, and HOST:PORT below\n")
    elif "HOST" in url:
        sys.stderr.write("put this machine's address in the place of HOST\n")
    for variable, value in (("URL", url), ("KEY", secret.text), ("SERVER_KEY", f"'{server}'")):
        sys.stdout.write(f"export LLMOS_{variable}={value}\n")


@app.command("list", epilog=EXIT_HELP)
@command
def list_(context: typer.Context, config: Config = None, state: StateDir = None, as_json: Json = False) -> None:
    """Show all keys, revoked ones included."""
    _, folder = _found(config, state)
    keys = KeyFile(folder).read()
    if wants_json(context, as_json):
        write_json([_plain(key) for key in keys])
        return
    columns = tuple((title, "word") for title in ("ID", "NAME", "TENANT", "ROLE", "CREATED", "REVOKED"))
    rows = (
        (key.id, short(key.name, 16), short(key.tenant, 12), key.role, _day(key.created), _day(key.revoked))
        for key in keys
    )
    terminal().print(table(columns, rows))


@app.command(epilog=EXIT_HELP)
@command
def revoke(
    context: typer.Context,
    key_id: Annotated[str, typer.Argument(help="The key's id, as list shows it.", metavar="ID")],
    config: Config = None,
    state: StateDir = None,
    as_json: Json = False,
) -> None:
    """Make a key worthless. A running gateway closes its sessions within a second."""
    _, folder = _found(config, state)
    key = KeyFile(folder).revoke(key_id)
    if wants_json(context, as_json):
        write_json(_plain(key))
    else:
        sys.stdout.write(f"key {key.id} ({printable(key.name)}) is revoked\n")


@app.command(epilog=EXIT_HELP)
@command
def server(context: typer.Context, config: Config = None, state: StateDir = None, as_json: Json = False) -> None:
    """Show the server's public key, which clients need (LLMOS_SERVER_KEY). It is made when it is first asked for."""
    _, folder = _found(config, state)
    public = make_server_key(folder).public
    if wants_json(context, as_json):
        write_json({"server_key": public})
    else:
        sys.stdout.write(f"{public}\n")


def _found(config: Path | None, state: Path | None) -> tuple[GatewayConfig, Path]:
    """The gateway's settings and the state directory that are meant."""
    whole = load_config(config)
    return whole.gateway, state_dir(StorageConfig(str(state)) if state is not None else whole.storage)


def _url(gateway: GatewayConfig) -> str:
    """Where clients find it; an address that stands for all of the machine's is none to connect to."""
    address = parse_address(gateway.tcp)
    if address is None:
        return "tcp://HOST:PORT"
    return replace(address, host="HOST").url if address.is_any else address.url


def _plain(key: Key) -> dict[str, object]:
    return {name: getattr(key, name) for name in ("id", "name", "tenant", "role", "public_key", "created", "revoked")}


def _day(moment: float | None) -> str:
    return "-" if moment is None else datetime.datetime.fromtimestamp(moment).strftime("%Y-%m-%d %H:%M")
