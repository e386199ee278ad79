"""Requests made from the OpenAPI document, right and wrong ones: none is answered with a 5xx.

FUZZ_EXAMPLES sets how many are tried per operation.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

pytest.importorskip("fastapi")
pytest.importorskip("schemathesis")
import schemathesis
from fastapi.testclient import TestClient
from schemathesis import GenerationMode

from archerchat.runtime import build_runtime
from archerchat.serving.app import build_app
from archerchat.serving.config import ServeConfig

EXAMPLES = int(os.environ.get("FUZZ_EXAMPLES", "25"))


@pytest.fixture(scope="module")
def api(served_home: Any) -> Iterator[Any]:
    app = build_app(served_home, build_runtime("cpu", "float32"), ServeConfig())
    with TestClient(app, base_url="http://127.0.0.1", raise_server_exceptions=False) as client:
        schema = schemathesis.openapi.from_dict(client.get("/openapi.json").json())
        schema.client = client
        yield schema
        stats = client.get("/stats").json()
        assert (stats["samples_in_work"], stats["rows"], stats["errors_total"]) == (0, 0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("mode", GenerationMode)
def test_no_request_breaks_the_server(api: Any, mode: GenerationMode) -> None:
    """One example after another of each operation, as the document has it or not."""
    for operation in (found.ok() for found in api.get_all_operations()):

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        @hypothesis.settings(
            max_examples=EXAMPLES,
            deadline=None,
            derandomize=True,
            database=None,
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        def send(case: Any) -> None:
            request = case.as_transport_kwargs(base_url="http://127.0.0.1")
            request.pop("cookies", None)
            response = api.client.request(**request)
            assert response.status_code < 500, response.text

        try:
            send()
        except hypothesis.errors.Unsatisfiable:  # every request fits where nothing is asked for
            assert mode is GenerationMode.NEGATIVE
