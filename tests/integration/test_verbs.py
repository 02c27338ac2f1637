"""Process verbs through the whole system: suspend and resume on the real CPU executor leave greedy output unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
from daemon import FAKE, running, wait_until
from small_models import make_model

from llmos import Client
from llmos.client.options import PageWord
from llmos.codes import SeqState
from llmos.errors import InvalidRequest, NotFound

pytestmark = pytest.mark.slow


def state_of(client: Client, rid: int) -> SeqState:
    return SeqState(next(row.state for row in client.ps() if row.rid == rid))


@pytest.mark.parametrize("pages", ["keep", "swap", "drop"])
def test_suspend_and_resume_leave_greedy_output_unchanged(pages: PageWord, tmp_path: Path):
    make_model("llama-tied", tmp_path / "model")
    config = (
        f'[microkernel]\nclient_window_tokens = 512\n[[models]]\nname = "small"\npath = "{tmp_path / "model"}"\n'
        'dtype = "float32"\nthreads = 1\nhost_cache_gib = 0.01\n'
    )
    with running(config) as daemon, Client(daemon.run_dir) as client:
        whole = client.generate([1, 2, 3], temperature=0.0, max_tokens=400)
        stream = client.generate([1, 2, 3], temperature=0.0, max_tokens=400, stream=True)
        ids = list(next(stream).token_ids)
        client.suspend(stream.rid, pages)
        assert state_of(client, stream.rid) is SeqState.SUSPENDED
        assert client.explain(stream.rid).suspensions == 1
        (row,) = client.ps()
        assert (row.pages > 0, row.host_pages > 0) == (pages == "keep", pages == "swap")
        client.resume(stream.rid)
        for chunk in stream:
            ids += chunk.token_ids
    assert tuple(ids) == whole.token_ids


def test_nice_tenants_and_errors_by_name():
    with running(FAKE + "\n[microkernel]\nclient_window_tokens = 512\n") as daemon, Client(daemon.run_dir) as client:
        stream = client.generate([1], stream=True, max_tokens=2000, ignore_eos=True, nice=3)
        next(stream)
        client.nice(stream.rid, -5)
        (row,) = client.ps()
        assert row.nice == -5
        with pytest.raises(InvalidRequest) as refused:
            client.nice(stream.rid, 20)
        assert refused.value.field == "nice"
        with pytest.raises(NotFound):
            client.suspend(999)
        (tenant,) = client.set_tenant(row.owner, weight=2.0, max_running=3)
        assert (tenant.weight, tenant.max_running, tenant.running) == (2.0, 3, 1)
        (listed,) = client.tenants()
        assert (listed.tenant, listed.weight, listed.max_running) == (row.owner, 2.0, 3)
        with pytest.raises(InvalidRequest) as impossible:
            client.generate([1], max_tokens=2000, deadline_s=1e-6)
        assert impossible.value.field == "deadline_ms"
        client.kill(stream.rid)
        wait_until(lambda: not client.ps(), "the killed sequence leaves ps")
