"""The private folder of one run: configuration, sockets, state, histories, logs. Made at the start, gone at the end."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

from chaos.answers import write_fake_model

MODEL = "chaos"
START_S = {"fake": 15.0, "demo": 60.0}  # a process may be stopped while it starts: this bounds the recovery from it
FAKE_MODEL = """
[[models]]
name = "chaos"
path = "{home}/model"
backend = "fake"
num_pages = 2048
"""
# float32: what is computed again after a crash may be computed in other pieces, and must not fall to the other side of a tie.
DEMO_MODEL = """
[[models]]
name = "demo"
backend = "cpu"
dtype = "float32"
threads = 1
kv_cache_gib = 0.25
"""
CONFIG = """
[daemon]
log_level = "warning"
start_timeout_s = {start_s}
hang_timeout_s = {hang_s}

[microkernel]
max_rows = 64
retention_s = 120.0

[http]
enabled = false

[storage]
state_dir = "{home}/state"
"""


class Home:
    """`model` is "fake" or "demo"."""

    def __init__(self, model: str, *, hang_s: float, step_ms: float) -> None:
        self.path = Path(tempfile.mkdtemp(prefix="llmos-chaos-"))  # short: unix socket paths are limited
        self.run_dir = self.path / "run"
        self.config = self.path / "llmosd.toml"
        self.log = self.path / "llmosd.log"
        self.histories = self.path / "histories"
        self.histories.mkdir()
        self.points = self.path / "points"
        self.points.mkdir()
        self.model = model
        self.start_s = START_S[model]
        if model == "fake":
            write_fake_model(self.path / "model")
        models = FAKE_MODEL if model == "fake" else DEMO_MODEL
        self.config.write_text((CONFIG + models).format(home=self.path, hang_s=hang_s, start_s=self.start_s))
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("LLMOS_")}
        self.environment |= {"LLMOS_FAKE_STEP_MS": str(step_ms), "LLMOS_FAKE_CHECK": "1"}

    @property
    def model_name(self) -> str:
        return MODEL if self.model == "fake" else "demo"

    def leftovers(self) -> list[str]:
        """Files in the run directory that a stopped llmosd must not leave."""
        return sorted(found.name for found in self.run_dir.iterdir()) if self.run_dir.exists() else []

    def remove(self) -> None:
        shutil.rmtree(self.path)
