"""Models that requests load, several at a time, by OpenAI's client; what goes on, as the server tells it."""

from __future__ import annotations

import base64
import json
import re
import struct
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.api.conftest import ADMIN_KEY, Several
from tests.e2e.conftest import start_server, wait_for

SECRET = "quintessential"  # stands in prompts, and nowhere else


def figures(several: Several) -> dict[tuple[str, ...], float]:
    """Every figure by its name and the values of its labels, in the order of their names."""
    text = several.admin.get("/metrics").text
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_a_request_loads_the_model_that_it_names_beside_the_other(several: Several) -> None:
    with pytest.raises(openai.NotFoundError, match="No model is loaded"):
        several.complete("")
    assert several.complete("one").usage.completion_tokens == 4
    assert several.complete("two").model == "two"
    assert list(several.loaded()) == ["one", "two"]  # the page goes on showing the first
    assert [model.id for model in several.openai.models.list().data][:2] == ["one", "two"]
    alone = several.complete("one").choices[0].text
    assert several.complete("two").choices[0].text == alone  # the same files


def test_the_one_used_least_recently_makes_room_and_a_pinned_one_stays(several: Several) -> None:
    for name in ("two", "one", "three"):
        several.complete(name)
    assert sorted(several.loaded()) == ["one", "three"]
    for name in ("one", "three"):
        assert several.guest.post("/v1/internal/model/pin", json={"model_name": name}).status_code == 403
        assert several.admin.post("/v1/internal/model/pin", json={"model_name": name}).json()["most"] == 2
    assert all(one["pinned"] for one in several.loaded().values())
    answer = several.guest.post("/v1/completions", json={"model": "two", "prompt": "a"})
    assert (answer.status_code, answer.json()["error"]["code"]) == (507, "no_place")
    assert sorted(several.loaded()) == ["one", "three"]


def test_requests_that_wait_are_all_answered_after_one_load(several: Several) -> None:
    several.unload("two")
    several.unload("three")
    before = figures(several).get(("loadstone_loads_total", "two", "loaded"), 0)
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda place: several.complete("two", f"text {place}"), range(12)))
    assert len({answer.choices[0].text for answer in answers}) > 1
    assert figures(several)["loadstone_loads_total", "two", "loaded"] == before + 1


def test_a_load_that_fails_is_told_to_all_who_wait(several: Several) -> None:
    several.complete("one")

    def failing(_: int) -> Any:
        with pytest.raises(openai.APIStatusError) as failed:
            several.complete("broken")
        return failed.value

    with ThreadPoolExecutor(3) as pool:
        errors = list(pool.map(failing, range(3)))
    assert all("no such function" in error.message for error in errors)
    assert len({error.code for error in errors}) == 1
    assert "one" in several.loaded()
    assert "broken" not in several.loaded()


def test_code_that_nobody_allowed_and_names_of_nothing_are_not_loaded(several: Several) -> None:
    with pytest.raises(openai.PermissionDeniedError, match="Python code"):
        several.complete("coded")
    with pytest.raises(openai.NotFoundError):
        several.complete("nothing")
    with pytest.raises(openai.NotFoundError):
        several.complete("../models/one")
    assert "coded" not in several.loaded()


def test_a_request_says_how_long_its_model_stays(several: Several) -> None:
    several.complete("one", key=ADMIN_KEY, keep_alive="10m")
    several.admin.post("/v1/internal/model/pin", json={"model_name": "one", "pinned": False})
    assert 590 < several.loaded()["one"]["ends_in_seconds"] <= 600
    several.complete("one", key=ADMIN_KEY, keep_alive=-1)
    assert several.loaded()["one"]["ends_in_seconds"] is None
    with pytest.raises(openai.BadRequestError, match="keep_alive: 'soon' is no time") as refused:
        several.complete("one", key=ADMIN_KEY, keep_alive="soon")
    assert refused.value.param == "keep_alive"
    several.complete("one", key=ADMIN_KEY, keep_alive=0)
    wait_for(lambda: "one" not in several.loaded(), "the model's end")


def test_a_stream_holds_its_model_until_it_ends(several: Several) -> None:
    with several.openai.completions.create(model="one", prompt="a", max_tokens=200, stream=True) as stream:
        next(iter(stream))
        assert several.loaded()["one"]["uses"] > 0
        assert several.loaded()["one"]["ends_in_seconds"] is None
    wait_for(lambda: several.loaded()["one"]["uses"] == 0, "the end of the answer")


def test_embeddings_in_both_formats_and_of_all_kinds_of_input(several: Several) -> None:
    answer = several.openai.embeddings.create(model="one", input=["a herring", "two words"])  # asks for base64
    plain = several.openai.embeddings.create(model="one", input="a herring", encoding_format="float")
    assert answer.data[0].embedding == pytest.approx(plain.data[0].embedding, abs=1e-5)
    assert (len(answer.data[0].embedding), answer.data[1].index) == (128, 1)
    assert answer.usage.prompt_tokens == answer.usage.total_tokens > plain.usage.prompt_tokens
    raw = several.guest.post(
        "/v1/embeddings", json={"model": "one", "input": [[5, 6], [7]], "encoding_format": "base64"}
    ).json()
    assert raw["usage"]["prompt_tokens"] == 3
    numbers = struct.unpack("<128f", base64.b64decode(raw["data"][0]["embedding"]))
    assert sum(number * number for number in numbers) == pytest.approx(1)


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": "a", "dimensions": 64}, "dimensions"),
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": [[5], []]}, "input"),
        ({"input": [99_999]}, "input"),
        ({"input": "word " * 300}, "256"),
        ({"input": "a", "encoding_format": "int8"}, "encoding_format"),
    ],
)
def test_embeddings_that_cannot_be_had_are_refused_by_name(several: Several, body: Any, words: str) -> None:
    answer = several.guest.post("/v1/embeddings", json={"model": "one", **body})
    assert answer.status_code == 400, answer.text
    assert words in answer.json()["error"]["message"]


def test_the_figures_are_those_of_the_traffic_and_tell_no_text(several: Several) -> None:
    several.complete("one")
    before = figures(several)
    answers = [several.complete("one", f"{SECRET} {place}", 5) for place in range(3)]
    for event in several.openai.completions.create(model="one", prompt=SECRET, max_tokens=6, stream=True):
        assert event.id
    with pytest.raises(openai.BadRequestError):
        several.complete("one", SECRET, key=ADMIN_KEY, keep_alive="soon")
    assert several.guest.get("/metrics").status_code == 403
    after = figures(several)

    def grown(*key: str) -> float:
        return after.get(key, 0) - before.get(key, 0)

    assert grown("loadstone_requests_total", "POST", "one", "/v1/completions", "200") == 4
    assert grown("loadstone_requests_total", "POST", "", "/v1/completions", "400") == 1
    assert grown("loadstone_failures_total", "option", "request") == 1
    assert grown("loadstone_failures_total", "access_refused", "request") == 1
    assert grown("loadstone_completion_tokens_total", "one") == sum(a.usage.completion_tokens for a in answers) + 6
    assert grown("loadstone_prompt_tokens_total", "one") > sum(a.usage.prompt_tokens for a in answers)
    assert grown("loadstone_first_token_seconds_count", "one") == 4
    assert after["loadstone_model_loaded", "one"] == 1
    assert after["loadstone_memory_bytes", "RAM", "one"] > 100 * 2**20
    assert after["loadstone_model_uses", "one"] == after["loadstone_answers", "one"] == 0
    text = several.admin.get("/metrics").text
    log = "".join(several.server.output)
    assert SECRET not in text
    assert SECRET not in log
    line = r"POST /v1/completions · 200 · [\d.]+ s · guest · one · \d+\+6 tokens · first after \d+ ms\n"
    assert wait_for(lambda: re.search(line, "".join(several.server.output)), "the line of the log")
    assert "/v1/internal/model/status" not in log


def test_the_state_comes_as_events_and_as_json(several: Several) -> None:
    for name in list(several.loaded()):
        several.unload(name)
    told: list[dict[str, Any]] = []

    def listen(http: httpx.Client, opened: threading.Event) -> None:
        with http.stream("GET", "/v1/internal/model/status", headers={"accept": "text/event-stream"}) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            for line in answer.iter_lines():
                if line.startswith("data: "):
                    told.append(json.loads(line.removeprefix("data: ")))
                    opened.set()
                    if told[-1]["state"] == "ready":
                        return

    opened = threading.Event()
    listener = threading.Thread(target=listen, args=(several.guest, opened))
    listener.start()
    assert opened.wait(20)
    several.complete("one")
    listener.join(20)
    assert not listener.is_alive()
    assert [told[0]["state"], told[-1]["state"]] == ["empty", "ready"]
    assert {"starting", "loading"} & {one["state"] for one in told}
    assert told[-1]["loaded"] == ["one"]
    assert several.guest.get("/v1/internal/model/status").json().keys() == told[0].keys()


def test_a_stream_of_the_state_ends_with_the_server(tmp_path: Any) -> None:
    (tmp_path / "models").mkdir()
    server = start_server(tmp_path, "--no-warm-worker")
    with httpx.stream(
        "GET", f"{server.url}/v1/internal/model/status", headers={"accept": "text/event-stream"}, timeout=30
    ) as answer:
        lines = answer.iter_lines()
        assert next(lines).startswith("data: ")
        server.process.terminate()
        assert [line for line in lines if line] == []  # a clean end: no exception
    server.process.wait(15)
    server.reader.join(5)
    assert "Traceback" not in "".join(server.output)
