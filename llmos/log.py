"""Logging set-up, the same in every process: one line per record on stderr, which children inherit from llmosd."""

from __future__ import annotations

import logging
import sys
import time

LEVELS = ("debug", "info", "warning", "error")


def setup_logging(service: str, level: str) -> None:
    """Send all records of this process to stderr, marked with the service's name. `level` is one of `LEVELS`."""
    assert level in LEVELS, level
    handler = logging.StreamHandler(sys.stderr)
    formatter = logging.Formatter(
        f"%(asctime)s.%(msecs)03dZ %(levelname)-7s {service.replace('%', '%%')} %(message)s",
        datefmt="%Y-%m-%dT%H:%M:%S",
    )
    formatter.converter = time.gmtime
    handler.setFormatter(formatter)
    root = logging.getLogger()
    for old in list(root.handlers):
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(level.upper())
    logging.captureWarnings(True)
