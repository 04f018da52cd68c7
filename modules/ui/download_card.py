"""The download panel of the Model tab: search the Hub or name a model there, see what would come, fetch it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from modules.hub import SIZES, SORTS, TASKS, Job, JobState, is_address, looks_like_a_name
from modules.hub.words import job_in_words
from modules.service import Service
from modules.service.downloads import Offer, Result
from modules.ui.cards import error_box
from modules.ui.common import bar, small, table
from modules.units import counted, format_bytes, format_count

_NARROW, _FITTING = "Narrow the search", "Fits this machine"
SLOTS = 5  # downloads that are shown at once


@dataclass(frozen=True)
class JobSlot:
    """The place of one download: its bar, and what can be done with it."""

    bar: gr.HTML
    pause: gr.Button
    resume: gr.Button
    cancel: gr.Button

    @property
    def widgets(self) -> list[Any]:
        return [self.bar, self.pause, self.resume, self.cancel]


@dataclass(frozen=True)
class DownloadCard:
    """The widgets of the panel. ``asked`` holds what the shown file list is of, ``keys`` which job is in which slot."""

    text: gr.Textbox
    look: gr.Button
    task: gr.Dropdown
    size: gr.Dropdown
    sort: gr.Dropdown
    fitting: gr.Checkbox
    results: gr.Radio
    offer: gr.HTML
    files: gr.Dropdown
    download: gr.Button
    slots: tuple[JobSlot, ...]
    more: gr.HTML
    clear: gr.Button
    token_line: gr.HTML
    token: gr.Textbox
    token_save: gr.Button
    token_test: gr.Button
    token_forget: gr.Button
    token_box: gr.Accordion
    sync: gr.Button
    asked: gr.State
    keys: gr.State
    done: gr.State

    @property
    def follows_look(self) -> list[Any]:
        """What :func:`offer_updates`, :func:`found_updates` and :func:`failed_updates` update."""
        return [self.results, self.offer, self.files, self.download, self.asked]

    @property
    def follows_jobs(self) -> list[Any]:
        """What :func:`job_updates` updates."""
        return [*(widget for slot in self.slots for widget in slot.widgets), self.more, self.clear, self.keys]


def build() -> DownloadCard:
    """Lay out the panel. Nothing is wired yet; see ``download_actions``."""
    with gr.Accordion("Download from the Hub", open=True, elem_id="download-card"):
        with gr.Row(elem_id="hub-row"):
            text = gr.Textbox(
                label="Model or LoRA on the Hub", placeholder="user/model:branch, an address, or words to search",
                elem_id="hub-ask", scale=5, min_width=200, max_lines=1,
            )  # fmt: skip
            look = gr.Button("Look", elem_id="hub-look", scale=0, min_width=80)
        with gr.Accordion(_NARROW, open=False, elem_id="hub-narrow"), gr.Row():
            task = _menu("Task", TASKS, "text-generation", "hub-task")
            size = _menu("Parameters", SIZES, "", "hub-size")
            sort = _menu("Order", SORTS, "downloads", "hub-sort")
            fitting = gr.Checkbox(label=_FITTING, elem_id="hub-fitting", min_width=190)
        results = gr.Radio(choices=[], label="Found", visible="hidden", elem_id="hub-results")
        offer = gr.HTML(elem_id="hub-offer", padding=False)
        files = gr.Dropdown(
            choices=[], multiselect=True, label="Files to fetch", visible="hidden", elem_id="hub-files"
        )  # fmt: skip
        download = gr.Button("Download", variant="primary", visible="hidden", elem_id="hub-download")
        slots = tuple(_slot(place) for place in range(SLOTS))
        more = gr.HTML(elem_id="hub-more", padding=False)
        clear = gr.Button("Clear the list", size="sm", visible="hidden", elem_id="hub-clear")
        with gr.Accordion("Token for private and gated models", open=False, elem_id="hub-token") as token_box:
            token_line = gr.HTML(elem_id="hub-token-line", padding=False)
            token = gr.Textbox(
                label="Token", type="password", placeholder="hf_…", elem_id="hub-token-text", max_lines=1
            )
            with gr.Row():
                save = gr.Button("Save", size="sm", elem_id="hub-token-save", min_width=80)
                test = gr.Button("Test", size="sm", elem_id="hub-token-test", min_width=80)
                forget = gr.Button("Forget it", size="sm", elem_id="hub-token-forget", min_width=80)
        sync = gr.Button("sync", visible="hidden", elem_id="sync-downloads")
    return DownloadCard(
        text, look, task, size, sort, fitting, results, offer, files, download, slots, more, clear,
        token_line, token, save, test, forget, token_box, sync, gr.State(""), gr.State([]), gr.State(-1),
    )  # fmt: skip


def _menu(label: str, words: Mapping[str, str], value: str, elem_id: str) -> gr.Dropdown:
    choices = [(word, key) for key, word in words.items()]
    return gr.Dropdown(choices=choices, value=value, label=label, elem_id=elem_id, min_width=190)


def _slot(place: int) -> JobSlot:
    with gr.Row(elem_classes="job-row"):
        shown = gr.HTML(elem_id=f"job-{place}", padding=False)
        pause = gr.Button("Pause", size="sm", visible="hidden", min_width=60, elem_id=f"job-pause-{place}", scale=0)
        resume = gr.Button("Resume", size="sm", visible="hidden", min_width=60, elem_id=f"job-resume-{place}", scale=0)
        cancel = gr.Button("Cancel", size="sm", visible="hidden", min_width=60, elem_id=f"job-cancel-{place}", scale=0)
    return JobSlot(shown, pause, resume, cancel)


# --- what is shown of a repository ---


def is_search(text: str) -> bool:
    return bool(text.strip()) and not looks_like_a_name(text) and not is_address(text)


def offer_updates(offer: Offer, asked: str) -> list[Any]:
    """The file list: what would be fetched chosen, all there is to choose from."""
    names = [file.name for file in offer.repository.files if not file.name.startswith(".")]
    sizes = {file.name: file.size for file in offer.repository.files}
    choices = [(f"{name} · {format_bytes(sizes[name])}", name) for name in names]
    ready = bool(offer.order.files)
    return [
        gr.skip(),
        offer_html(offer),
        gr.update(choices=choices, value=[file.name for file in offer.order.files], visible=True),
        gr.update(visible=True, value=_button(offer), interactive=ready),
        asked,
    ]


def _button(offer: Offer) -> str:
    if not offer.order.files:
        return "Choose a file first"
    return f"Download {format_bytes(offer.missing_bytes)}" if offer.missing_bytes else "Put it in place"


def offer_html(offer: Offer, verdict: str = "", left_out: Mapping[str, str] | None = None) -> str:
    """Name, size, where it goes, what is left out; the verdict once it is known."""
    wanted, left_out = offer.order.files, offer.choice.left_out if left_out is None else left_out
    total = format_bytes(offer.order.size_bytes)
    here = f", {format_bytes(offer.here_bytes)} of them here already" if offer.here_bytes else ""
    kind = "LoRA" if offer.choice.kind == "lora" else "model"
    rows = [
        ("Fetches", f"{counted(len(wanted), 'file')}, {total}{here}" if wanted else ""),
        ("Goes to", f"{'loras' if kind == 'LoRA' else 'models'}/{offer.order.name}" if wanted else ""),
        ("Free", f"{format_bytes(offer.free_bytes)} on the disk"),
        ("Licence", offer.repository.licence),
        ("Commit", offer.repository.commit[:10]),
    ]
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in (*offer.notes, offer.choice.question) if note)
    head = f"<b>{escape(offer.repository.name)}</b> · {kind}" + (" · gated" if offer.repository.gated else "")
    said = f'<div class="{_verdict_class(verdict)}">{escape(verdict)}</div>' if verdict else ""
    return f'<div class="card offer">{head}{table(rows)}{said}{notes}{_left_out(left_out)}</div>'


def _verdict_class(verdict: str) -> str:
    return "ok" if ". Fits." in verdict else "bad" if "Too large" in verdict else "small"


def _left_out(left_out: Mapping[str, str]) -> str:
    if not left_out:
        return ""
    word = "file is" if len(left_out) == 1 else "files are"
    summary = f"{len(left_out)} {word} left out; add them in the list below to have them"
    return f'<details data-keep="left-out"><summary>{summary}</summary>{table(left_out.items())}</details>'


def found_updates(results: list[Result], text: str, narrowed: str = "") -> list[Any]:
    """What a search found, to choose from. ``narrowed``: what :func:`narrowed_in_words` says of it."""
    choices = [(_found_in_words(result), result.found.name) for result in results]
    line = small("Choose one to see its files." if results else f"Nothing on the Hub is called {text!r}{narrowed}.")
    return [
        gr.update(choices=choices, value=None, visible=True if choices else "hidden"),
        line,
        gr.update(visible="hidden", choices=[], value=[]),
        gr.update(visible="hidden"),
        "",
    ]


def narrowed_in_words(task: str, size: str, fitting: bool) -> str:
    """What a search leaves out, and where that is set: it may be folded away. ``""`` where it leaves nothing out."""
    parts = [TASKS.get(task, task) if task else "", SIZES.get(size, size) if size else "", _FITTING if fitting else ""]
    words = ", ".join(part for part in parts if part)
    return f" among: {words} (see {_NARROW})" if words else ""


def _found_in_words(result: Result) -> str:
    found = result.found
    parts = [
        found.name,
        f"{format_count(found.parameters)} parameters" if found.parameters else "",
        result.fits,
        f"{format_count(found.downloads)} downloads",
        "gated" if found.gated else "",
    ]
    return " · ".join(part for part in parts if part)


def failed_updates(error: Any) -> list[Any]:
    """What was refused, where the file list would be."""
    hidden = gr.update(visible="hidden")
    return [gr.skip(), f'<div class="card failed">{error_box(error)}</div>', hidden, hidden, ""]


# --- what is shown of downloads ---


def job_updates(service: Service) -> list[Any]:
    """Updates for ``card.follows_jobs``: the open downloads first, then those that have ended, the latest first."""
    jobs = service.downloads.queue.jobs()
    ordered = [job for job in jobs if job.state.is_open] + [job for job in reversed(jobs) if not job.state.is_open]
    shown = ordered[:SLOTS]
    updates: list[Any] = []
    for job in shown:
        updates += _slot_updates(job)
    updates += ["", *[gr.update(visible="hidden")] * 3] * (SLOTS - len(shown))
    rest = len(ordered) - len(shown)
    ended = any(not job.state.is_open for job in jobs)
    more = small(f"and {rest} more") if rest else ""
    return [*updates, more, gr.update(visible=True if ended else "hidden"), [job.key for job in shown]]


def _slot_updates(job: Job) -> list[Any]:
    def seen(yes: bool) -> Any:
        return gr.update(visible=True if yes else "hidden")

    return [
        job_html(job),
        seen(job.state in (JobState.RUNNING, JobState.WAITING)),
        seen(job.state in (JobState.PAUSED, JobState.FAILED)),
        seen(job.state.is_open or job.state is JobState.FAILED),
    ]


_SIGNS = {JobState.DONE: "ready", JobState.FAILED: "failed", JobState.RUNNING: "busy"}


def job_html(job: Job) -> str:
    """One download: its name, a bar, bytes, speed and what is left, or its error."""
    total = job.order.size_bytes
    percent = 100 * min(job.done_bytes, total) / total if total else 100.0
    name = job.order.name
    head = (
        f'<div class="device-head"><span><span class="dot {_SIGNS.get(job.state, "idle")}" aria-hidden="true"></span> '
        f"{escape(name)}</span><span>{percent:.0f} %</span></div>"
    )
    error = error_box(job.error) if job.error and job.state is JobState.FAILED else ""
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in job.notes)
    shown = bar(name, percent) if job.state.is_open or job.state is JobState.FAILED else ""
    return (
        f'<div class="job" data-state="{job.state.value}">{head}{shown}{small(job_in_words(job))}{error}{notes}</div>'
    )


def token_html(service: Service) -> str:
    """Which token is in use, masked, and where it is from."""
    token = service.downloads.token()
    if not token.is_there:
        return small("No token. Only what everybody may see can be downloaded.")
    return small(f"In use: {token.masked}, from {token.source}.")
