"""Hostile frames: what any peer may send ends no process, and disturbs nobody. The long run is `python bench/fuzz.py --frames 1000000`."""

from __future__ import annotations

import json
import subprocess
import sys
import typing
from pathlib import Path
from typing import Any

import pytest
from hostile.frames import FrameMaker
from hostile.inside import Inside

from llmos.errors import ProtocolError
from llmos.protocol import messages as m
from llmos.protocol.codec import Schema, encode

BENCH = Path(__file__).parents[2] / "bench"
UNIONS = [
    "ClientToGateway", "GatewayToClient", "GatewayToTokenizer", "TokenizerToGateway", "ToKernel", "FromKernel", "ToSupervisor",
    "FromSupervisor",
]  # fmt: skip


@pytest.mark.parametrize("name", UNIONS)
def test_every_port_decodes_or_refuses(name: str) -> None:
    schema: Schema[Any] = Schema(getattr(m, name))
    maker = FrameMaker(1, getattr(m, name))
    decoded: set[type] = set()
    refused: list[str] = []
    for _ in range(5000):
        frame = maker.frame()
        try:
            decoded.add(type(message := schema.decode(frame)))
        except ProtocolError as error:
            refused.append(error.message)
        else:
            encode(message)
    assert decoded >= set(typing.get_args(getattr(m, name))) - {m.Hello}
    assert len(refused) > 500
    assert max(map(len, refused)) < 500  # an answer is not larger than what it answers


@pytest.mark.parametrize("seed", range(3))
def test_the_microkernel_survives_corrupt_peers_and_an_innocent_stream_does_not_notice(seed: int) -> None:
    world = Inside(seed)
    for number in range(6000):
        world.attack()
        if not number % 300:
            world.mend()
            world.kernel.check()
    assert world.finished > 30
    assert world.decoded > 2000
    assert len(world.kernel.state.lanes) == 2


@pytest.mark.slow
def test_frames_on_the_ports_of_a_real_daemon(tmp_path: Path) -> None:
    out = tmp_path / "fuzz.json"
    command = [
        sys.executable,
        str(BENCH / "fuzz.py"),
        "--frames",
        "4000",
        "--port",
        "client,executor",
        "--out",
        str(out),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(out.read_text())["rows"]
    assert [(row["port"], row["frames"], row["good"]) for row in rows] == [
        ("client", 4000, True),
        ("executor", 4000, True),
    ]
    for row in rows:
        assert row["innocent_streams"] > 0
        assert set(row["deaths"]) <= {"executor.rogue"}
    assert rows[1]["deaths"]["executor.rogue"] >= 1  # it was thrown out


@pytest.mark.parametrize(
    ("arguments", "word"), [(("--frames", "0"), "not above 0"), (("--frames", "1", "--port", "x"), "'x'")]
)
def test_bad_options_are_refused_by_name(arguments: tuple[str, ...], word: str) -> None:
    done = subprocess.run(
        [sys.executable, str(BENCH / "fuzz.py"), *arguments], capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert word in done.stderr
