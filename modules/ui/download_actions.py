"""What the download panel does when it is used, and how it follows the downloads of the server."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError, UserError
from modules.hub.words import pattern_of
from modules.service import Service
from modules.ui import lora_card
from modules.ui.common import DIRECT, QUIET, guarded, inform, on_latest, small
from modules.ui.download_card import (
    DownloadCard,
    failed_updates,
    found_updates,
    is_search,
    job_updates,
    narrowed_in_words,
    offer_html,
    offer_updates,
    token_html,
)
from modules.ui.model_tab import ModelTab, labelled, model_choices


def _looked(service: Service, text: str, task: str, size: str, sort: str, fitting: bool) -> list[Any]:
    """The file list of what is named, or what a search finds."""
    text = (text or "").strip()
    if not text:
        return [gr.skip()] * 5
    try:
        if is_search(text):
            results = service.downloads.search(text, task=task, size=size, sort=sort, fitting=fitting)
            return found_updates(results, text, narrowed_in_words(task, size, fitting))
        offer = service.downloads.look(text)
        return [gr.update(visible="hidden", value=None), *offer_updates(offer, text)[1:]]
    except LoadstoneError as error:
        return failed_updates(error)


def _chosen(service: Service, name: str | None) -> list[Any]:
    """One of the search's results was chosen: its name in the field, its files below."""
    if not name:
        return [gr.skip()] * 6
    try:
        return [name, *offer_updates(service.downloads.look(name), name)]
    except LoadstoneError as error:
        return [name, *failed_updates(error)]


def _judged(service: Service, asked: str, files: list[str] | None) -> list[Any]:
    """The verdict, which takes a moment longer: headers come by range requests."""
    if not asked or not files:
        return [gr.skip(), gr.skip()]
    try:
        shown = service.downloads.look(asked)
        offer = service.downloads.narrowed(shown, pattern_of(files))
    except LoadstoneError:
        return [gr.skip(), gr.skip()]
    left_out = {name: why for name, why in shown.choice.left_out.items() if name not in files}
    verdict = service.downloads.verdict(offer)
    return [offer_html(offer, verdict, left_out), offer_updates(offer, asked)[3]]


def _downloaded(service: Service, asked: str, files: list[str] | None) -> list[Any]:
    """Queue what is chosen; its bar stands where the file list was. Raises what a download is refused for."""
    if not files:
        raise UserError("No file is chosen.", "Choose those to fetch.")
    service.downloads.download(asked, pattern_of(files))
    hidden = gr.update(visible="hidden")
    return [hidden, "", hidden, hidden, "", *job_updates(service)]


def _acted(service: Service, action: Callable[[str], Any], place: int, keys: list[str]) -> list[Any]:
    if place < len(keys):
        action(keys[place])
    return job_updates(service)


def _cleared(service: Service) -> list[Any]:
    service.downloads.queue.clear()
    return job_updates(service)


def _synced(service: Service, model: str | None, done: int) -> list[Any]:
    """The downloads as they are; and the menus, when one of them has brought something."""
    ended = sum(1 for job in service.downloads.queue.jobs() if not job.state.is_open)
    menus = [gr.skip(), gr.skip()]
    if ended != done:
        loras = lora_card.labelled(service.loras.offers(model or ""))
        menus = [gr.update(choices=labelled(service, model_choices(service))), gr.update(choices=loras)]
    return [*menus, ended, *job_updates(service)]


def _token_saved(service: Service, token: str) -> list[Any]:
    owner = service.downloads.save_token(token)
    inform(f"The token of {owner} is saved.")
    return [token_html(service), ""]


def _token_tested(service: Service) -> str:
    return small(f"The token is {service.downloads.test_token()}'s.")


def _token_forgotten(service: Service) -> str:
    service.downloads.forget_token()
    return token_html(service)


def wire(tab: ModelTab, service: Service) -> None:
    """Connect the panel of ``tab``, whose menus get what has been downloaded."""
    card = tab.downloads
    narrowed = [card.text, card.task, card.size, card.sort, card.fitting]
    judge: dict[str, Any] = {
        "fn": partial(_judged, service), "inputs": [card.asked, card.files], "outputs": [card.offer, card.download],
        **DIRECT,
    }  # fmt: skip
    shown: dict[str, Any] = {**DIRECT, "show_progress": "minimal", "show_progress_on": card.offer}
    looked = on_latest(
        [card.text.submit, card.look.click], partial(_looked, service), narrowed, card.follows_look, **shown
    )
    looked.then(**judge)
    chosen = card.results.input(partial(_chosen, service), card.results, [card.text, *card.follows_look], **shown)
    chosen.then(**judge)
    card.files.input(**judge)
    jobs = len(card.follows_jobs)
    both = [*card.follows_look, *card.follows_jobs]
    card.download.click(guarded(len(both), partial(_downloaded, service)), [card.asked, card.files], both, **QUIET)
    queue = service.downloads.queue
    for place, slot in enumerate(card.slots):
        for button, action in ((slot.pause, queue.pause), (slot.resume, queue.resume), (slot.cancel, queue.cancel)):
            act = guarded(jobs, partial(_acted, service, action, place))
            button.click(act, card.keys, card.follows_jobs, **QUIET)
    card.clear.click(guarded(jobs, partial(_cleared, service)), None, card.follows_jobs, **QUIET)
    synced = partial(_synced, service)
    follows = [tab.model, tab.loras.menu, card.done, *card.follows_jobs]
    on_latest([card.sync.click], synced, [tab.model, card.done], follows)
    _wire_token(card, service)


def _wire_token(card: DownloadCard, service: Service) -> None:
    card.token_box.expand(partial(token_html, service), None, card.token_line, **QUIET)
    saved = guarded(2, partial(_token_saved, service))
    gr.on([card.token_save.click, card.token.submit], saved, card.token, [card.token_line, card.token], **QUIET)
    card.token_test.click(guarded(1, partial(_token_tested, service)), None, card.token_line, **QUIET)
    card.token_forget.click(guarded(1, partial(_token_forgotten, service)), None, card.token_line, **QUIET)
