"""The executor's OpenMP threads must not spin for long; what the user set stays."""

from __future__ import annotations

import os

import pytest

from llmos.services.executor.backend import limit_openmp_spinning


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"GOMP_SPINCOUNT": "1000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "active"}, {"OMP_WAIT_POLICY": "active"}),
    ],
)
def test_limits_spinning_unless_it_is_set(monkeypatch, before, after):
    environment = dict(before)
    monkeypatch.setattr(os, "environ", environment)
    limit_openmp_spinning()
    assert environment == after
