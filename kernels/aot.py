"""Compile every kernel variant for GPUs that are not here, and compare what they need with a recorded table.

`python -P -m llmos.kernels.aot` compiles all variants for sm_80, sm_90 and sm_100 and says what has grown beyond `aot_table.json`;
`--write` records what the table lacks. Registers, stack (where spilled registers go) and shared memory are read from the machine code with
the tools that come with Triton. It needs its own process without TRITON_INTERPRET, which changes what a kernel is. Nothing here is a speed.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from itertools import product
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from llmos.kernels.variants import Variant

ARCHITECTURES = (90, 80, 100)
TABLE = Path(__file__).with_name("aot_table.json")
# Another version of Triton than the recorded one may need this much more.
_SLACK = {"registers": 48, "stack": 64, "shared": 4096}
_CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

Needs = dict[str, int]


def all_variants() -> Iterator[Variant]:
    """Of every module of this package that has `variants`."""
    names = [found.name for found in pkgutil.iter_modules([str(Path(__file__).parent)])]
    for name in sorted(names):
        module = importlib.import_module(f"llmos.kernels.{name}")
        yield from getattr(module, "variants", tuple)()


def compile_variant(variant: Variant, architecture: int) -> Needs:
    """Machine code for one variant: registers per thread, bytes of stack per thread, bytes of shared memory per program."""
    source = ASTSource(variant.kernel, variant.signature(), variant.constants, variant.attributes())
    options = {"num_warps": variant.num_warps, "num_stages": variant.num_stages, "enable_fp_fusion": False}
    compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        done = subprocess.run([_CUOBJDUMP, "-res-usage", file.name], capture_output=True, text=True, check=True)
    registers, stack = (max(map(int, re.findall(rf"{what}:(\d+)", done.stdout))) for what in ("REG", "STACK"))
    return {"registers": registers, "stack": stack, "shared": compiled.metadata.shared}


def compare(name: str, architecture: int, needs: Needs, table: dict[str, Any]) -> list[str]:
    """What exceeds the table, in words."""
    recorded = table["variants"].get(name, {}).get(str(architecture))
    if recorded is None:
        return [f"{name} sm_{architecture}: not in {TABLE.name}; run this with --write"]
    slack = {key: 0 if table["triton"] == triton.__version__ else _SLACK[key] for key in _SLACK}
    return [
        f"{name} sm_{architecture}: {key} {needs[key]}, recorded {recorded[key]}"
        for key in needs
        if needs[key] > recorded[key] + slack[key]
    ]


def read_table() -> dict[str, Any]:
    return json.loads(TABLE.read_text()) if TABLE.exists() else {"triton": "", "variants": {}}


def check(variants: Iterable[Variant], architectures: Iterable[int]) -> list[str]:
    """Compile all; what exceeds the table."""
    table = read_table()
    return [
        line
        for architecture, variant in product(architectures, list(variants))
        for line in compare(variant.name, architecture, _measure(variant, architecture), table)
    ]


def record(variants: Iterable[Variant], architectures: Iterable[int], *, again: bool) -> None:
    """Compile what the table lacks, or all `again`; the table is written after each, so that this can be interrupted."""
    for architecture, variant in product(architectures, list(variants)):
        known = read_table()["variants"].get(variant.name, {})
        if again or str(architecture) not in known:
            needs = _measure(variant, architecture)
            table = read_table()  # another process may have written meanwhile
            table["variants"].setdefault(variant.name, {})[str(architecture)] = needs
            write_table(table)


def _measure(variant: Variant, architecture: int) -> Needs:
    """`compile_variant`, with a line that says what it found."""
    started = time.monotonic()
    needs = compile_variant(variant, architecture)
    text = ", ".join(f"{value} {key}" for key, value in needs.items())
    print(f"{variant.name} sm_{architecture}: {text} ({time.monotonic() - started:.1f} s)", flush=True)
    return needs


def forget(names: set[str]) -> None:
    """Of the table, keep only these variants; none if another Triton compiled them."""
    table = read_table()
    kept = table["variants"] if table["triton"] == triton.__version__ else {}
    table["variants"] = {name: needs for name, needs in kept.items() if name in names}
    write_table(table)


def write_table(table: dict[str, Any]) -> None:
    """One line a variant, so that changes can be read."""
    lines = ",\n".join(
        f"  {json.dumps(name)}: {json.dumps(needs)}" for name, needs in sorted(table["variants"].items())
    )
    new = TABLE.with_suffix(f".{os.getpid()}")
    new.write_text(f'{{"triton": {json.dumps(triton.__version__)}, "variants": {{\n{lines}\n}}}}\n')
    new.replace(TABLE)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", type=int, nargs="+", default=ARCHITECTURES, help="compute capabilities, 90 for sm_90")
    parser.add_argument("--only", default="", help="regular expression that variant names must match")
    parser.add_argument("--write", action="store_true", help=f"record what {TABLE.name} lacks")
    parser.add_argument("--again", action="store_true", help="record also what it has")
    parser.add_argument("--list", action="store_true", help="print the variants' names and compile nothing")
    args = parser.parse_args()
    everything = list(all_variants())
    chosen = [variant for variant in everything if re.search(args.only, variant.name)]
    if args.list:
        print(*(variant.name for variant in chosen), sep="\n")
        return 0
    exceeding: list[str] = []
    with tempfile.TemporaryDirectory() as cache:
        os.environ["TRITON_CACHE_DIR"] = cache
        if args.write or args.again:
            forget({variant.name for variant in everything})
            record(chosen, args.arch, again=args.again)
        else:
            exceeding = check(chosen, args.arch)
    print(*exceeding, sep="\n", file=sys.stderr)
    return 1 if exceeding else 0


if __name__ == "__main__":
    sys.exit(main())
