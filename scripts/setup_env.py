"""Make or update the virtual environment for `make run` and `make test`. Standard library only; run by any Python >= 3.11.

torch is chosen for this box: the CPU build where there is no NVIDIA GPU, else the CUDA build; LLMOS_TORCH=cpu|cuda decides instead.
The Makefile's stamp files say when this needs to run again; running it twice changes nothing.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
CPU_INDEX = "https://download.pytorch.org/whl/cpu/"
CPU_TORCH = "torch==2.13.0"
CUDA_TORCH = "torch>=2.11"
PROBE_TIMEOUT_S = 3.0


def torch_kind() -> str:
    """cpu or cuda, and say why."""
    forced = os.environ.get("LLMOS_TORCH", "")
    if forced in ("cpu", "cuda"):
        say(f"torch: {forced} build (LLMOS_TORCH)")
        return forced
    if forced:
        sys.exit(f"setup: LLMOS_TORCH must be cpu or cuda, not {forced!r}")
    kind = "cuda" if shutil.which("nvidia-smi") or Path("/dev/nvidia0").exists() else "cpu"
    found = "an NVIDIA GPU" if kind == "cuda" else "no NVIDIA GPU"
    say(f"torch: {kind} build ({found} here; LLMOS_TORCH=cpu or cuda decides otherwise)")
    return kind


def torch_arguments(kind: str) -> list[str]:
    """What pip is told for torch. PyPI's Linux build needs CUDA libraries of gigabytes, so CPU wheels come from their own index."""
    if kind == "cuda":
        return [CUDA_TORCH]
    try:
        with urllib.request.urlopen(CPU_INDEX, timeout=PROBE_TIMEOUT_S):
            return [CPU_TORCH, "--extra-index-url", CPU_INDEX]
    except (urllib.error.URLError, OSError):
        say(f"torch: {CPU_INDEX} does not answer, taking what the default index has")
        return [CPU_TORCH]


def make_venv() -> Path:
    """The environment's Python; made if it is missing or broken."""
    python = VENV / "bin" / "python"
    if (
        python.exists()
        and subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0
    ):
        return python
    say(f"making {VENV} with {sys.executable} ({sys.version.split()[0]})")
    made = subprocess.run([sys.executable, "-m", "venv", "--clear", str(VENV)], check=False)
    if made.returncode:
        sys.exit("setup: can not make a virtual environment; on Debian and Ubuntu: apt install python3-venv")
    return python


def pip_install(python: Path, *arguments: str, quiet: bool = True) -> None:
    command = [
        str(python),
        "-m",
        "pip",
        "install",
        "--disable-pip-version-check",
        *(["--quiet"] if quiet else []),
        *arguments,
    ]
    if subprocess.run(command, cwd=ROOT, check=False).returncode:
        sys.exit(f"setup: pip failed; the command was: {' '.join(command)}")


def compile_sources(python: Path) -> None:
    """pip compiles what it installs, but not what stays here. Where Python may not write (PYTHONDONTWRITEBYTECODE, a read-only folder under
    systemd) every process would compile anew at each start, and a restart take a third longer."""
    folders = [str(ROOT / name) for name in ("llmos", "services", "kernels")]
    subprocess.run([python, "-m", "compileall", "-q", *folders], check=False)  # slower without, but not wrong


def say(text: str) -> None:
    sys.stderr.write(f"setup: {text}\n")
    sys.stderr.flush()


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the virtual environment.")
    parser.add_argument("--test", action="store_true", help="also what the tests need")
    parser.add_argument("--stamp", type=Path, required=True, help="file to touch when all is installed")
    options = parser.parse_args()
    started = time.monotonic()
    kind = torch_kind()
    python = make_venv()
    installed = VENV / ".torch-kind"
    if not installed.exists() or installed.read_text() != kind:
        # The other build has the same version number for pip: it would be kept without this.
        change = ["--upgrade", "--force-reinstall"] if installed.exists() else []
        pip_install(python, *change, *torch_arguments(kind), quiet=False)
        installed.write_text(kind)
    extras = ",".join((["gpu"] if kind == "cuda" else []) + (["test"] if options.test else []))
    say("installing llmos and what it needs")
    pip_install(python, "--editable", f".[{extras}]" if extras else ".")
    compile_sources(python)
    for old in VENV.glob(".ready-*"):  # those of another choice of torch are no longer true
        if old.name.split("-")[1] != options.stamp.name.split("-")[1]:
            old.unlink()
    options.stamp.touch()
    say(f"ready after {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    if sys.version_info < (3, 11):  # noqa: UP036 - this file is what finds out
        sys.exit(f"setup: llmos needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}")
    main()
