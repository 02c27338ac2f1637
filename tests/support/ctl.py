"""llmosctl in process, with typer's runner, against a `GatewayWorld`."""

from __future__ import annotations

import json
from typing import Any

from gateway_world import GatewayWorld
from typer.testing import CliRunner

from llmos.ctl.main import app


def ctl(world: GatewayWorld, *arguments: object, stdin: str | None = None) -> Any:
    """The result: exit_code, stdout, stderr."""
    return CliRunner().invoke(app, ["--run-dir", str(world.path), *map(str, arguments)], input=stdin)


def shown(world: GatewayWorld, *arguments: object) -> str:
    """stdout of a command that has to succeed."""
    result = ctl(world, *arguments)
    assert result.exit_code == 0, result.stderr
    return str(result.stdout)


def json_of(world: GatewayWorld, *arguments: object) -> Any:
    return json.loads(shown(world, *arguments, "--json"))
