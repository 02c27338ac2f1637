"""`python -P -m llmos.services.executor`: one model's executor process."""

from __future__ import annotations

from llmos.services.base import service_main
from llmos.services.executor.service import run

if __name__ == "__main__":
    service_main("executor", run)
