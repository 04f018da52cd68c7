"""Answers as the page's script follows them: whole, in order, and only by whoever knows their name."""

from __future__ import annotations

import json
import threading

from fastapi import FastAPI
from fastapi.testclient import TestClient

from modules.ui import live


def followed(answers: live.LiveAnswers, name: str) -> str:
    app = FastAPI()
    live.mount(app, answers)
    with TestClient(app).stream("GET", f"{live.ROUTE}/{name}") as response:
        assert response.status_code == 200
        return "".join(json.loads(line) for line in response.iter_lines())


def test_an_answer_is_followed_until_it_ends() -> None:
    answers = live.LiveAnswers()
    words = ["A ", "line\nand ", 'a "quote" ', "🌍"]
    with answers.begin("chatbot") as coming:

        def write() -> None:
            for word in words:
                coming.text += word
                ended.wait(0.3)
            coming.over = True

        ended = threading.Event()
        writer = threading.Thread(target=write)
        writer.start()
        seen = followed(answers, coming.name)
        writer.join()
    assert seen
    assert "".join(words).startswith(seen)  # what comes last of all is Gradio's to show


def test_an_answer_that_is_over_or_unknown_gives_nothing() -> None:
    answers = live.LiveAnswers()
    with answers.begin("chatbot") as coming:
        coming.text = "secret"
        assert followed(answers, "guessed") == ""
    assert followed(answers, coming.name) == ""


def test_every_answer_has_a_name_of_its_own() -> None:
    answers = live.LiveAnswers()
    with answers.begin("chatbot") as one, answers.begin("chatbot") as other:
        assert one.name != other.name
        assert answers.find(one.name) is one


def test_the_line_says_how_much_is_rendered() -> None:
    answer = live.Live("chatbot", "name", "four")
    assert (
        answer.line("a < b")
        == '<div class="small" data-live="name" data-place="chatbot" data-rendered="4">a &lt; b</div>'
    )
