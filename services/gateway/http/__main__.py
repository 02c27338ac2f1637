"""Entry of an HTTP worker: `python -P -m llmos.services.gateway.http --run-dir DIR --listen-fd N`."""

from __future__ import annotations

from llmos.services.base import async_service_main
from llmos.services.gateway.http.service import run

if __name__ == "__main__":
    async_service_main("http", run)
