"""Makes Triton's interpreter quick enough for a grid of shapes.

In each call from a kernel to a device function it looks through all of triton.language for what is not patched yet, which took most
of the time. Here that happens once per launch and module.
"""

from __future__ import annotations

import pytest
from triton.runtime import interpreter


@pytest.fixture(autouse=True)
def _patch_once_per_launch(monkeypatch):
    patch, launch = interpreter._patch_lang, interpreter.GridExecutor.__call__
    patched = {}

    def patch_once(function):
        key = id(function.__globals__)
        if key not in patched:
            patched[key] = patch(function)
        return patched[key]

    def launch_afresh(self, *args, **kwargs):
        patched.clear()
        return launch(self, *args, **kwargs)

    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launch_afresh)
