"""The Training tab: data and options on the left, what it takes and how it goes on the right, perplexity below."""

from __future__ import annotations

from dataclasses import dataclass
from html import escape
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError, NothingLoaded
from modules.options import TRAINING_OPTIONS
from modules.service import Service
from modules.service.training import TrainState
from modules.training.messages import DATA_FORMATS
from modules.ui import asking, cards, perplexity_card, text_source
from modules.ui.fixes import fix_label
from modules.ui.form import widget_value
from modules.ui.remembered import Remembered
from modules.ui.training_form import Fields, build_fields
from modules.ui.training_views import problem_card, run_in_words, training_card

_FORMATS = {
    "auto": "as the data looks",
    "text": "plain text, all of it is learned",
    "chat": "JSON lines of messages, the assistant's are learned",
    "pairs": "JSON lines of prompt and completion, the completion is learned",
}
_EXAMPLE = '{"messages": [{"role": "user", "content": "…"}, {"role": "assistant", "content": "…"}]}'


@dataclass(frozen=True)
class TrainingTab:
    """The widgets. What was looked at, and what waits for a yes, are this page's alone; the rest is the server's."""

    source: text_source.TextSource
    data_format: gr.Dropdown
    name: gr.Textbox
    look: gr.Button
    fields: Fields
    model: gr.HTML
    fix: gr.Button
    start: gr.Button
    line: gr.HTML
    unload: gr.Button
    anyway: gr.Button
    no: gr.Button
    estimate: gr.HTML
    pause: gr.Button
    keep: gr.Button
    cancel: gr.Button
    card: gr.HTML
    apply: gr.Button
    compare: gr.Button
    runs: gr.Column
    run: gr.Dropdown
    resume: gr.Button
    discard: gr.Button
    preview: gr.HTML
    perplexity: perplexity_card.PerplexityCard
    sync: gr.Button  # hidden; page.js clicks it when a training, or what it is for, has changed
    looked: gr.State  # whether the data that is chosen was looked at
    waiting: gr.State  # what waits for a yes: "start", or "resume NAME"
    cancelling: asking.Asking
    discarding: asking.Asking

    @property
    def inputs(self) -> list[Any]:
        """What says how to train: the format, the data, then the options."""
        return [self.data_format, *self.source.widgets, *self.fields.values()]

    @property
    def remembered(self) -> Remembered:
        """What a browser keeps: all but the name, which is another for each LoRA, and an upload, which it cannot."""
        options = {
            name: (field, widget_value(TRAINING_OPTIONS[name], TRAINING_OPTIONS[name].default))
            for name, field in self.fields.items()
        }
        data = {"format": (self.data_format, DATA_FORMATS[0]), **self.source.remembered}
        return Remembered("loadstone-training", {**options, **data, **self.perplexity.remembered})

    @property
    def follows_state(self) -> list[Any]:
        """What :func:`state_updates` updates."""
        buttons = [self.start, self.pause, self.keep, self.cancel, self.apply, self.compare]
        return [self.model, self.fix, self.card, *buttons, self.runs, self.run]

    @property
    def follows_attempt(self) -> list[Any]:
        """What an attempt to begin updates."""
        return [self.line, self.unload, self.anyway, self.no, self.waiting]


def build() -> TrainingTab:
    """Lay out the tab. Nothing is wired yet; see ``training_actions``."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            source, data_format = _data()
            with gr.Row(elem_id="training-look-row", elem_classes="flow"):
                look = _button("Look at the examples", "look")
            fields = build_fields()
        with gr.Column(scale=5, min_width=320, elem_id="training-state"):
            model = gr.HTML(elem_id="training-model", elem_classes="tight", padding=False)
            fix = _button("", "fix", variant="primary", visible="hidden")
            name = gr.Textbox(
                label="Name of the LoRA", info="Its folder under loras/.", elem_id="training-name", max_lines=1,
                placeholder="pirate",
            )  # fmt: skip
            with gr.Row(elem_id="training-start-row", elem_classes="flow"):
                start = gr.Button("Train", variant="primary", elem_id="training-start", min_width=120)
            line = gr.HTML(elem_id="training-line", elem_classes="tight", padding=False)
            with gr.Row(elem_id="training-ask", elem_classes="flow"):
                unload = _button("", "unload", variant="primary", visible="hidden")
                anyway = _button("Train anyway: memory may run out", "anyway", variant="stop", visible="hidden")
                no = _button("Not now", "no", visible="hidden")
            card = gr.HTML(elem_id="training-card", elem_classes="tight", padding=False)
            with gr.Row(elem_id="training-buttons", elem_classes="flow"):
                pause = _button("Pause", "pause", visible="hidden")
                keep = _button("Stop and keep", "keep", visible="hidden")
                cancel = _button("Cancel and delete …", "cancel", variant="stop", visible="hidden")
                apply = _button("Apply it", "apply", variant="primary", visible="hidden")
                compare = _button("Compare with and without it", "compare", visible="hidden")
            cancelling = asking.build("training-cancel", "cancel and delete it", "go on with it")
            runs, run, resume, discard, discarding = _unfinished()
            estimate = gr.HTML(elem_id="training-estimate", elem_classes="tight", padding=False)
            preview = gr.HTML(elem_id="training-preview", elem_classes="tight", padding=False)
    perplexity = perplexity_card.build()
    sync = gr.Button("sync", visible="hidden", elem_id="sync-training")
    return TrainingTab(
        source, data_format, name, look, fields, model, fix, start, line, unload, anyway, no, estimate, pause, keep,
        cancel, card, apply, compare, runs, run, resume, discard, preview, perplexity, sync, gr.State(False),
        gr.State(""), cancelling, discarding,
    )  # fmt: skip


def _data() -> tuple[text_source.TextSource, gr.Dropdown]:
    source = text_source.build(
        "training", "What to learn from", "Text, or JSON lines of conversations or of prompts with completions.",
        hub=True, placeholder=_EXAMPLE,
    )  # fmt: skip
    data_format = gr.Dropdown(
        [(_FORMATS[name], name) for name in DATA_FORMATS], value=DATA_FORMATS[0], label="Format",
        elem_id="training-format", filterable=False, interactive=True,
    )  # fmt: skip
    return source, data_format


def _unfinished() -> tuple[gr.Column, gr.Dropdown, gr.Button, gr.Button, asking.Asking]:
    with gr.Column(visible="hidden", elem_id="training-runs") as runs:
        run = gr.Dropdown(
            choices=[], label="Unfinished trainings", elem_id="training-run", interactive=True,
            info="Paused, or ended by a crash: each goes on from its last checkpoint.",
        )  # fmt: skip
        with gr.Row(elem_id="training-run-buttons", elem_classes="flow"):
            resume, discard = _button("Resume", "resume"), _button("Delete …", "discard")
    # Not in the column: Gradio 6.31 shows buttons that are to be hidden when a column around them appears.
    discarding = asking.build("training-discard", "delete it", "keep it")
    return runs, run, resume, discard, discarding


def _button(text: str, name: str, **more: object) -> gr.Button:
    return gr.Button(text, size="sm", min_width=80, elem_id=f"training-{name}", **more)


# --- what the widgets show ---


def state_updates(service: Service) -> list[Any]:
    """Updates for ``tab.follows_state``: the same in every tab of every browser."""
    state = service.training.state()
    problem = None if state.running else service.training.problem({})
    loaded = service.snapshot().loaded
    fix = fix_label(problem, loaded.order.options if loaded else None)
    return [
        model_line(service, state, problem),
        gr.update(visible=_seen(bool(problem and problem.fix)), value=fix),
        training_card(state),
        gr.update(interactive=not state.running),
        *[gr.update(visible=_seen(state.running))] * 3,
        *[gr.update(visible=_seen(applicable(service, state)))] * 2,
        *_run_updates(service),
    ]


def _seen(yes: bool) -> Any:
    return True if yes else "hidden"


def applicable(service: Service, state: TrainState) -> bool:
    """Whether a LoRA has just been trained on the model that is loaded."""
    loaded = service.snapshot().loaded
    return bool(state.trained and state.order and loaded and loaded.order.name == state.order.load.name)


def model_line(service: Service, state: TrainState, problem: LoadstoneError | None) -> str:
    """The model that would be trained, or why none can be."""
    if state.running:
        return ""
    if isinstance(problem, NothingLoaded):
        return '<p class="note">Load a model on the Model tab first: the LoRA is trained on it, as it is loaded.</p>'
    loaded = service.snapshot().loaded
    on = cards.loaded_in_words(loaded) if loaded else ""
    line = f'<div class="small">Trains on <b>{escape(on)}</b></div>' if on else ""
    return line + problem_card(problem)


def _run_updates(service: Service) -> list[Any]:
    """The unfinished ones. Which is chosen stays a person's choice, where there is one to make."""
    found = service.training.runs()
    choices = [(run_in_words(run), run.name) for run in found]
    only = {"value": found[0].name} if len(found) == 1 else {}
    return [gr.update(visible=_seen(bool(found))), gr.update(choices=choices, **only)]
