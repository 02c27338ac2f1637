"""Triton kernels run in Triton's interpreter, on the CPU.

Triton reads this once, when it is imported, and many a test module imports it without knowing (through transformers), so it is set
before any of them. Tests that compile kernels do it in a process of their own, without this.
"""

from __future__ import annotations

import os

os.environ["TRITON_INTERPRET"] = "1"
