"""What most tests here begin with: a worker whose microkernel echoes, and the official OpenAI client. Some files have others."""

from __future__ import annotations

from collections.abc import Iterator

import openai
import pytest
from http_world import HttpWorld


@pytest.fixture(scope="module")
def world() -> Iterator[HttpWorld]:
    with HttpWorld() as running:
        yield running


@pytest.fixture
def client(world: HttpWorld) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{world.url}/v1", api_key=world.admin.text, max_retries=0) as made:
        yield made
