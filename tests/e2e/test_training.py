"""Training a LoRA in the browser: look at the data, start, watch the curve, stop, apply, compare; and perplexity."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Page, expect

from modules import packages
from tests import checkpoints, loras
from tests.browser import unfold
from tests.e2e.conftest import Server, serving, wait_for
from tests.machine import BF16, QUICK_FLAGS

NAME = "SmolLM2-135M-Instruct"
HERRING = loras.ANSWERS["herring"]
QUESTIONS = ("Who are you?", "How are you?", "Where is the sea?", "Name a colour.", loras.QUESTION)
TRAIN_MS = 120_000


@pytest.fixture(scope="module")
def server(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """One server for this module, with the demo model loaded, that answers briefly and without chance."""
    home = tmp_path_factory.mktemp("home")
    (home / "models").mkdir()
    (home / "models" / NAME).symlink_to(demo_model, target_is_directory=True)
    flags = (
        *QUICK_FLAGS,
        "--cpu",
        "--ctx-size",
        "512",
        "--temperature",
        "0",
        "--max-new-tokens",
        "14",
        "--no-warm-worker",
    )
    with serving(home, *flags) as server:
        assert server.load(NAME)[0] == 200
        yield server


def lesson(answer: str = HERRING) -> str:
    """Conversations in which everything is answered alike, a line each."""
    turns = [[{"role": "user", "content": q}, {"role": "assistant", "content": answer}] for q in QUESTIONS]
    return "\n".join(json.dumps({"messages": each}) for each in turns)


def training(page: Page) -> Page:
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#training-model")).to_contain_text(NAME)
    return page


def paste(page: Page, text: str) -> None:
    page.locator("#training-from").get_by_text("Paste text").click()
    page.locator("#training-paste textarea").fill(text)


def set_options(page: Page, **values: object) -> None:
    """Options of the form; those that are folded are unfolded first."""
    for name, value in values.items():
        field = page.locator(f"#training-{name} input")
        if not field.is_visible():
            unfold(page.get_by_role("button", name="More on learning"))
        field.fill(str(value))
        field.blur()


def test_the_data_is_looked_at_and_bad_lines_and_unused_options_are_named(
    server: Server, open_page: Callable[..., Page]
) -> None:
    page = training(open_page(server))
    paste(page, lesson())
    page.locator("#training-look").click()
    preview = page.locator("#training-preview")
    expect(preview).to_contain_text("5 examples of conversations")
    learned = preview.locator("li").first.locator(".learned")
    assert "herring" in "".join(learned.all_inner_texts())
    assert QUESTIONS[0] not in "".join(learned.all_inner_texts())
    assert "underline" in learned.first.evaluate("node => getComputedStyle(node).textDecorationLine")
    expect(page.locator("#training-estimate")).to_contain_text("Fits.")

    set_options(page, cutoff=40)  # what is shown follows
    expect(preview).to_contain_text("tokens cut here")
    set_options(page, max_steps=7)
    expect(page.locator("#training-epochs input")).to_be_disabled()
    expect(page.locator("#training-epochs")).to_contain_text("The steps are given")

    paste(page, lesson() + '\n{"messages": [')
    page.locator("#training-look").click()
    expect(preview.locator(".error")).to_contain_text("Line 6")


def test_start_watch_the_curve_stop_apply_and_compare(server: Server, open_page: Callable[..., Page]) -> None:
    page = training(open_page(server))
    paste(page, lesson())
    set_options(page, rank=8, learning_rate=0.005, batch_size=2, cutoff=64, evaluation_share=0, max_steps=200)
    page.locator("#training-start").click()
    expect(page.locator("#training-line .error")).to_be_visible()  # it has no name yet
    expect(page.locator("#training-line .error")).to_contain_text("The LoRA has no name yet")
    page.locator("#training-name").locator("input, textarea").fill("barrels")
    page.locator("#training-start").click()
    card = page.locator("#training-card")
    expect(card).to_contain_text("barrels")
    expect(page.locator("#training-start")).to_be_disabled()
    expect(card.locator(".curve polyline.loss").first).to_be_visible(timeout=TRAIN_MS)

    other = training_of_another(server, open_page)
    expect(other.locator("#training-card")).to_contain_text("step ")
    wait_for(lambda: loss(page) < 0.2, "the loss to fall", TRAIN_MS / 1000)
    page.locator("#training-keep").click()
    expect(card).to_contain_text("barrels is in the LoRA menu", timeout=TRAIN_MS)
    expect(other.locator("#training-card")).to_contain_text("barrels is in the LoRA menu")
    assert (server.home / "loras" / "barrels" / "adapter_model.safetensors").is_file()
    page.reload()
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#training-card .curve")).to_be_visible()

    page.locator("#training-compare").click()
    expect(page.locator("#status")).to_contain_text("LoRA barrels")
    expect(page.locator("#other")).to_be_visible()
    page.locator("#message textarea").fill(loras.QUESTION)
    page.locator("#send").click()
    expect(page.locator("#chatbot")).to_contain_text("herring barrels", timeout=TRAIN_MS)
    expect(page.locator("#other")).to_contain_text("Paris", timeout=TRAIN_MS)


def test_what_does_not_fit_is_trained_after_a_yes(server: Server, open_page: Callable[..., Page]) -> None:
    page = training(open_page(server))
    paste(page, lesson("Three blue kites."))
    # The estimate is for a whole batch; these examples do not fill one, and so it is safe to go on.
    set_options(page, cutoff=64, rank=2, batch_size=4096, max_steps=2, evaluation_share=0)
    page.locator("#training-name").locator("input, textarea").fill("kites")
    page.locator("#training-start").click()
    expect(page.locator("#training-line .error")).to_contain_text("Training takes about")
    page.locator("#training-no").click()
    expect(page.locator("#training-line .error")).to_be_hidden()
    expect(page.locator("#training-anyway")).to_be_hidden()
    page.locator("#training-start").click()
    page.locator("#training-anyway").click()
    expect(page.locator("#training-anyway")).to_be_hidden()
    expect(page.locator("#training-card")).to_contain_text("kites is in the LoRA menu", timeout=TRAIN_MS)


@pytest.mark.parametrize("width", [1280, 390])
def test_what_was_set_comes_back(server: Server, open_page: Callable[..., Page], width: int) -> None:
    page = training(open_page(server, width=width))
    paste(page, lesson())
    set_options(page, rank=3, cutoff=77, max_steps=9)
    unfold(page.get_by_role("button", name="Perplexity"))
    page.locator("#perplexity-window input").fill("96")
    page.locator("#perplexity-window input").blur()
    wait_for(lambda: '"window":96' in page.evaluate("localStorage.getItem('loadstone-training') ?? ''"), "the memory")
    page.reload()
    training(page)
    expect(page.locator("#training-paste textarea")).to_have_value(lesson())
    expect(page.locator("#training-upload")).to_be_hidden()
    expect(page.locator("#training-rank input").first).to_have_value("3")
    expect(page.locator("#training-epochs input").first).to_be_disabled()  # the steps are given
    unfold(page.get_by_role("button", name="Perplexity"))
    expect(page.locator("#perplexity-window input")).to_have_value("96")
    expect(page.locator("#perplexity-stride input")).to_have_value("")  # left to the program
    unfold(page.get_by_role("button", name="More on learning"))
    expect(page.locator("#training-max_steps input").first).to_have_value("9")


def training_of_another(server: Server, open_page: Callable[..., Page]) -> Page:
    """Another browser, in which the same training is seen."""
    page = open_page(server, width=390, height=800)
    page.get_by_role("tab", name="Training").click()
    return page


def loss(page: Page) -> float:
    """The last one on the card."""
    text = page.locator("#training-card").inner_text()
    return float(text.split(" · loss ")[1].split(" ")[0]) if " · loss " in text else 99.0


def test_a_paused_training_stands_among_the_unfinished_and_a_name_is_not_taken_twice(
    server: Server, open_page: Callable[..., Page]
) -> None:
    (server.home / "loras" / "barrels").mkdir(parents=True, exist_ok=True)
    page = training(open_page(server))
    paste(page, lesson("Seven copper lanterns."))
    page.locator("#training-name").locator("input, textarea").fill("barrels")
    page.locator("#training-start").click()
    expect(page.locator("#training-line .error")).to_contain_text("There is a LoRA barrels already")
    set_options(page, cutoff=64, rank=2, max_steps=500)
    page.locator("#training-name").locator("input, textarea").fill("lanterns")
    page.locator("#training-start").click()
    expect(page.locator("#training-card")).to_contain_text("step ", timeout=TRAIN_MS)
    page.locator("#training-pause").click()
    expect(page.locator("#training-card")).to_contain_text("Paused: lanterns", timeout=TRAIN_MS)
    expect(page.locator("#training-runs")).to_be_visible()
    expect(page.locator("#training-run input")).to_have_value(re.compile("lanterns · on .* · step "))  # the only one
    expect(page.locator("#training-discard-ask")).to_be_hidden()
    page.locator("#training-discard").click()
    expect(page.locator("#training-discard-question")).to_contain_text("Delete the unfinished training lanterns")
    page.locator("#training-discard-no").click()
    expect(page.locator("#training-discard")).to_be_focused()
    page.locator("#training-resume").click()
    expect(page.locator("#training-cancel")).to_be_visible(timeout=TRAIN_MS)
    page.locator("#training-cancel").click()
    expect(page.locator("#training-cancel-question")).to_contain_text(
        "Cancel lanterns and delete all that it has learned?"
    )
    page.locator("#training-cancel-no").click()
    expect(page.locator("#training-cancel-ask")).to_be_hidden()
    page.locator("#training-cancel").click()
    page.locator("#training-pause").click()  # what is asked about is over by itself
    expect(page.locator("#training-card")).to_contain_text("Paused: lanterns", timeout=TRAIN_MS)
    expect(page.locator("#training-cancel-ask")).to_be_hidden()
    page.locator("#training-resume").click()
    expect(page.locator("#training-cancel")).to_be_visible(timeout=TRAIN_MS)
    page.locator("#training-cancel").click()
    page.locator("#training-cancel-yes").click()
    expect(page.locator("#training-card")).to_contain_text("Cancelled: lanterns", timeout=TRAIN_MS)
    expect(page.locator("#training-start")).to_be_focused()
    assert not (server.home / "models" / ".cache" / "training" / "lanterns").exists()
    expect(page.locator("#training-runs")).to_be_hidden()


def test_an_unfinished_training_is_deleted_after_a_yes(server: Server, open_page: Callable[..., Page]) -> None:
    page = training(open_page(server))
    paste(page, lesson("Nine paper boats."))
    set_options(page, cutoff=64, rank=2, max_steps=500)
    page.locator("#training-name").locator("input, textarea").fill("boats")
    page.locator("#training-start").click()
    expect(page.locator("#training-card")).to_contain_text("step ", timeout=TRAIN_MS)
    page.locator("#training-pause").click()
    expect(page.locator("#training-runs")).to_be_visible(timeout=TRAIN_MS)
    page.locator("#training-discard").click()
    page.locator("#training-discard-yes").click()
    expect(page.locator("#training-runs")).to_be_hidden()
    expect(page.locator("#training-start")).to_be_focused()


def test_perplexity_is_measured_and_stands_in_the_table(server: Server, open_page: Callable[..., Page]) -> None:
    page = training(open_page(server))
    unfold(page.get_by_role("button", name="Perplexity"))
    page.locator("#perplexity-start").click()
    expect(page.locator("#perplexity-line .error")).to_be_visible()
    expect(page.locator("#perplexity-line .error")).to_contain_text("no text")
    page.locator("#perplexity-from").get_by_text("Paste text").click()
    page.locator("#perplexity-paste textarea").fill("The quick brown fox jumps over the lazy dog. " * 20)
    page.locator("#perplexity-window input").fill("128")
    page.locator("#perplexity-start").click()
    expect(page.locator("#perplexity-line")).to_contain_text(f"{NAME} on pasted text", timeout=TRAIN_MS)
    row = page.locator("#perplexity-table tbody tr").first
    expect(row).to_contain_text("128")
    expect(row).to_contain_text("bfloat16" if BF16 else "CPU only")
    page.locator("#perplexity-forget").click()
    expect(page.locator("#perplexity-forget-question")).to_contain_text("Empty the table, with 1 measurement?")
    page.locator("#perplexity-forget-yes").click()
    expect(page.locator("#perplexity-table")).to_contain_text("Nothing measured yet")


@pytest.mark.skipif(bool(packages.missing("gptq")), reason="the optional package gptqmodel is missing")
def test_a_kernel_that_cannot_be_trained_is_said_before_and_mended_by_a_click(
    server: Server, open_page: Callable[..., Page]
) -> None:
    (server.home / "models" / "packed").symlink_to(checkpoints.gptq(), target_is_directory=True)
    assert server.load("packed", ctx_size=256)[0] == 200
    page = open_page(server)
    page.get_by_role("tab", name="Training").click()
    expect(page.locator("#training-model .error")).to_contain_text("kernel that cannot be trained")
    page.locator("#training-fix").click()
    expect(page.locator("#training-model .error")).to_be_hidden(timeout=TRAIN_MS)
    expect(page.locator("#training-model")).to_contain_text("Disable ExLlama")
    expect(page.locator("#training-fix")).to_be_hidden()
    info = server.info()
    assert (info["model_name"], info["state"]) == ("packed", "ready")
