"""Kernels compile for GPUs that are not here, and need no more registers, stack and shared memory than the recorded table says.

The compiler runs in processes of its own: TRITON_INTERPRET, which all other tests have, changes what a kernel is.
"""

from __future__ import annotations

import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys

import pytest
import triton

import llmos.kernels
from llmos.kernels import aot
from llmos.kernels.variants import Variant

# What CI compiles: one variant of each kind for Hopper, the smallest for the others. `python -P -m llmos.kernels.aot` compiles all.
SAMPLES = [
    (r"^add_rms_norm bf16 hidden=2880$|^silu_mul bf16|head_dim=(80|128 norm)$|^(copy|zero)_pages|^advance stops", "90"),
    (r"^sampling (count|penalise|bias|copy bf16|scan bf16 adjust report|choose bf16 adjust report|report bf16)$", "90"),
    (r"^plan |^(decode|prefill) bf16 head_dim=128 groups=4 page=64$", "90"),
    (r"^silu_mul bf16|^apply_diff|^prepare_decode", "80"),
    (r"^silu_mul bf16|^apply_diff|^prepare_prefill", "100"),
]


def compiler(*arguments):
    """Run the command without the interpreter."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [sys.executable, "-P", "-m", "llmos.kernels.aot", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment)


@pytest.mark.slow
@pytest.mark.parametrize(("names", "architecture"), SAMPLES)
def test_needs_are_within_the_table(names, architecture):
    done = compiler("--only", names, "--arch", architecture)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) >= 2, done.stdout


def test_the_table_has_every_variant():
    recorded = json.loads(aot.TABLE.read_text())["variants"]
    names = [variant.name for variant in aot.all_variants()]
    assert len(set(names)) == len(names), "two variants have one name"
    assert sorted(recorded) == sorted(names), "run: python -P -m llmos.kernels.aot --write"
    for name, needs in recorded.items():
        assert {int(architecture) for architecture in needs} == set(aot.ARCHITECTURES), name


def test_no_variant_spills_much():
    """Spilled registers go to the stack: none do, but for those that are named here with what is allowed."""
    allowed = {
        "decode bf16 head_dim=256 groups=8 page=64 window softcap": 8,
        "prefill bf16 head_dim=128 groups=4 page=64": 48,  # on sm_80, whose matrix units take their operands from registers
        # Descriptors become plain loads on sm_80, where these are compiled but never chosen.
        "decode bf16 head_dim=128 groups=4 page=64 descriptors": 16,
        "prefill bf16 head_dim=128 groups=4 page=64 descriptors": 864,
    }
    for name, needs in json.loads(aot.TABLE.read_text())["variants"].items():
        for architecture, figures in needs.items():
            assert figures["stack"] <= allowed.get(name, 0), f"{name} sm_{architecture}: {figures}"
            assert figures["shared"] <= 160 * 1024, f"{name} sm_{architecture}: {figures}"


def test_every_kernel_has_a_variant():
    """What is launched (its name ends with `kernel`) is compiled ahead of time, too."""
    kernels = {}
    for found in pkgutil.iter_modules(llmos.kernels.__path__):
        module = importlib.import_module(f"llmos.kernels.{found.name}")
        for name, value in vars(module).items():
            if name.endswith("kernel") and hasattr(value, "arg_names"):
                kernels[id(value)] = f"{found.name}.{name}"
    compiled = {id(variant.kernel) for variant in aot.all_variants()}
    assert [name for key, name in kernels.items() if key not in compiled] == []


def test_every_variant_fits_its_kernel():
    for variant in aot.all_variants():
        words = variant.signature()
        assert all(
            re.fullmatch(r"\*?(bf16|fp16|fp32|fp8e4nv|i8|i32|i64)|tensordesc<.*>|constexpr", word)
            for word in words.values()
        ), words
        assert [words[name] for name in variant.constants] == ["constexpr"] * len(variant.constants)


def test_more_than_recorded_is_reported():
    needs = {"registers": 40, "stack": 0, "shared": 512}
    table = {"triton": triton.__version__, "variants": {"a": {"90": needs}}}
    assert aot.compare("a", 90, needs, table) == []
    assert aot.compare("a", 90, {**needs, "registers": 41}, table) == ["a sm_90: registers 41, recorded 40"]
    assert aot.compare("a", 90, {**needs, "stack": 8}, table) == ["a sm_90: stack 8, recorded 0"]
    assert len(aot.compare("b", 90, needs, table)) == len(aot.compare("a", 80, needs, table)) == 1
    other = {**table, "triton": "0.0"}  # another compiler may differ a little
    assert aot.compare("a", 90, {**needs, "registers": 60}, other) == []
    assert aot.compare("a", 90, {**needs, "shared": 2**16}, other) == ["a sm_90: shared 65536, recorded 512"]


def test_types_that_do_not_fit_are_noticed():
    kernel = next(iter(aot.all_variants())).kernel
    with pytest.raises(AssertionError, match="types for"):
        Variant("x", kernel, "*fp32").signature()
