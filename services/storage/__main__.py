"""Entry point: `python -P -m llmos.services.storage`."""

from __future__ import annotations

from llmos.services.base import service_main
from llmos.services.storage.service import run

if __name__ == "__main__":
    service_main("storage", run)
