"""What goes on, counted."""

from __future__ import annotations

import logging

import pytest
from prometheus_client.parser import text_string_to_metric_families

from modules.errors import OutOfMemory
from modules.protocol import Done, Memory
from modules.service import Traffic
from tests.supervised import order


def test_requests_are_counted_and_logged_but_those_of_pages_and_polls(caplog: pytest.LogCaptureFixture) -> None:
    traffic = Traffic()
    with caplog.at_level(logging.INFO):
        for route, kind in (("/v1/models", ""), ("page", ""), ("/healthz", ""), ("/v1/models", "access_refused")):
            seen = traffic.begin("GET")
            seen.route, seen.kind, seen.status, seen.role = route, kind, 403 if kind else 200, "guest"
            traffic.end(seen)
    assert [record.message.split(" · ")[0] for record in caplog.records] == ["GET /v1/models"] * 2
    assert [seen.kind for seen in traffic.recent()] == ["access_refused", ""]
    assert (traffic.totals().requests, traffic.totals().failures) == (2, 1)


def test_a_method_of_somebodys_own_makes_no_series_of_its_own() -> None:
    traffic = Traffic()
    for number in range(5):
        traffic.end(traffic.begin(f"METHOD{number}"))
    text = traffic.exposition([], [], 0).decode()
    assert "METHOD" not in text
    assert 'loadstone_requests_total{method="other",model="",route="page",status="0"} 5.0' in text


def test_answers_and_loads_are_summed_up() -> None:
    traffic = Traffic()
    assert traffic.totals().first_token_s is None
    traffic.answered("a", Done("stop", 10, 20, 0.1, 1.0), 0.5)
    traffic.answered("b", Done("stop", 1, 2, 0.1, 1.0), 1.5)
    traffic.read("a", 7)
    traffic.load_ended(order("a"), 3.0, None)
    traffic.load_ended(order("b"), 4.0, OutOfMemory("full"))
    totals = traffic.totals()
    assert (totals.prompt_tokens, totals.completion_tokens, totals.first_token_s) == (18, 22, 1.0)
    assert totals.failures == 0  # a load's is no request's
    families = text_string_to_metric_families(traffic.exposition([], [("a", Memory(5, 6, (7,)))], 3).decode())
    samples = {(one.name, *sorted(one.labels.values())): one.value for family in families for one in family.samples}
    assert (
        samples["loadstone_loads_total", "a", "loaded"] == samples["loadstone_loads_total", "b", "out_of_memory"] == 1
    )
    assert samples["loadstone_load_seconds_sum", "a"] == 3
    assert ("loadstone_load_seconds_sum", "b") not in samples
    assert samples["loadstone_failures_total", "load", "out_of_memory"] == 1
    assert samples["loadstone_memory_bytes", "RAM", "a"] == 5
    assert samples["loadstone_memory_bytes", "GPU 0", "a"] == 7
    assert samples["loadstone_waiting_for_load",] == 3
