"""llmosd with stand-ins for all children. Environment: STANDINS = "name=behaviour,..." (default: well-behaved)."""

from __future__ import annotations

import dataclasses
import os
import sys
from pathlib import Path

from llmos.config import HttpConfig
from llmos.supervisor import main as llmosd

behaviours = dict(pair.split("=") for pair in os.environ.get("STANDINS", "").split(",") if pair)
real_plan = llmosd.make_plan
real_load = llmosd.load_config


def make_plan(config, config_file, run_dir, http_fd):
    def standin(spec):
        behaviour = behaviours.get(spec.name, "good")
        script = str(Path(__file__).with_name("standin.py"))
        options = spec.command[spec.command.index("--run-dir") :]
        return dataclasses.replace(spec, command=(sys.executable, "-P", script, behaviour, spec.role, *options))

    return tuple(tuple(standin(spec) for spec in stage) for stage in real_plan(config, config_file, run_dir))


llmosd.make_plan = make_plan
llmosd.load_config = lambda path: dataclasses.replace(real_load(path), http=HttpConfig(enabled=False))
llmosd.check_models = lambda config: []
sys.exit(llmosd.main())
