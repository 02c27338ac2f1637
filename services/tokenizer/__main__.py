"""`python -P -m llmos.services.tokenizer`: the tokenizer process."""

from __future__ import annotations

from llmos.services.base import async_service_main
from llmos.services.tokenizer.service import run

if __name__ == "__main__":
    async_service_main("tokenizer", run)
