"""Entry of the gateway process: `python -P -m llmos.services.gateway --run-dir DIR`."""

from __future__ import annotations

from llmos.services.base import async_service_main
from llmos.services.gateway.service import run

if __name__ == "__main__":
    async_service_main("gateway", run)
