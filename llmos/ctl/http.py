"""`llmosctl env` and `open`: how other programs, and a browser, get at the HTTP of the llmosd on this machine.

Both read what llmosd left in its run directory, and the key of the first start in the state directory; so they work for the daemon's user
and root only, who may do everything anyway.
"""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Annotated

import typer

from llmos.ctl.arguments import Json, RunDir, wants_json
from llmos.ctl.errors import EXIT_HELP, command
from llmos.ctl.render import write_json
from llmos.errors import InvalidRequest, Unauthorized
from llmos.http_links import make_link
from llmos.http_place import HttpPlace, find_run_dir, read_note
from llmos.keys.admin_key import FILE_NAME, read_admin_key
from llmos.keys.keyfile import KeyFile
from llmos.keys.secret import Secret

app = typer.Typer()


@app.command(epilog=EXIT_HELP)
@command
def env(context: typer.Context, run_dir: RunDir = None, as_json: Json = False) -> None:
    """Print what OpenAI's and Anthropic's clients need, for a shell: eval "$(llmosctl env)"."""
    place, secret = found(context, run_dir)
    values = {
        "OPENAI_BASE_URL": f"{place.url}/v1",
        "OPENAI_API_KEY": secret.text,
        "ANTHROPIC_BASE_URL": place.url,
        "ANTHROPIC_API_KEY": secret.text,
    }
    if wants_json(context, as_json):
        write_json(values)
        return
    for name, value in values.items():
        sys.stdout.write(f"export {name}={shlex.quote(value)}\n")


@app.command("open", epilog=EXIT_HELP)
@command
def open_(
    context: typer.Context,
    show: Annotated[bool, typer.Option("--print", help="Only print the link; start no browser.")] = False,
    run_dir: RunDir = None,
    as_json: Json = False,
) -> None:
    """Open the page in a browser, by a link that works once within two minutes."""
    place, secret = found(context, run_dir)
    url = f"{place.url}/open?token={make_link(_folder(context, run_dir), secret.id)}"
    if wants_json(context, as_json):
        write_json({"url": url})
        return
    sys.stdout.write(f"{url}\n")
    browser = shutil.which("xdg-open")
    if not show and browser is not None and sys.stdout.isatty():
        subprocess.Popen([browser, url], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True)


def _folder(context: typer.Context, here: str | None) -> Path:
    where = here or context.obj["run_dir"]
    if where is not None and "://" in where:
        raise InvalidRequest("this is about the llmosd of this machine: give its --run-dir, not a URL", field="url")
    return find_run_dir(where)


def found(context: typer.Context, here: str | None) -> tuple[HttpPlace, Secret]:
    """Where the HTTP of this machine's llmosd is, and its first key."""
    place = read_note(_folder(context, here))
    folder = Path(place.state_dir)
    secret = read_admin_key(folder)
    if secret is None:
        text = f"{folder / FILE_NAME} is not there: keys were made by hand; llmosctl keys add makes another"
        raise Unauthorized(text, field="key")
    if not any(key.id == secret.id and key.revoked is None for key in KeyFile(folder).read()):
        raise Unauthorized(f"the key in {folder / FILE_NAME} was revoked; llmosctl keys add makes another", field="key")
    return place, secret
