"""What a click on the Training tab does, and which widget it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError, MustUnload, OutOfMemory
from modules.options import changed
from modules.service import Service
from modules.service.training import Data
from modules.training.messages import Preview
from modules.ui import asking, chat_loras, perplexity_card, text_source
from modules.ui.cards import error_box
from modules.ui.common import DIRECT, PRIVATE, edits, on_latest, small
from modules.ui.training_form import field_updates, field_values
from modules.ui.training_tab import TrainingTab, state_updates
from modules.ui.training_views import estimate_card, preview_card

START, RESUME = "start", "resume "
_TO_PREVIEW = "() => document.getElementById('training-preview').scrollIntoView({block: 'nearest', behavior: 'smooth'})"
_HIDDEN = gr.update(visible="hidden")


def _data(raw: Sequence[Any], sources: int) -> Data:
    """The data that ``tab.inputs`` name."""
    chosen = text_source.chosen(*raw[1 : 1 + sources])
    return Data(chosen.path, chosen.text, chosen.hub, raw[0])


class Actions:
    """What the buttons do. ``raw``: the values of ``tab.inputs``."""

    def __init__(self, tab: TrainingTab, service: Service) -> None:
        self._tab = tab
        self._service = service
        self._sources = len(tab.source.widgets)

    def _read(self, raw: Sequence[Any]) -> tuple[Data, dict[str, Any]]:
        """Raises OptionError."""
        return _data(raw, self._sources), field_values(raw[1 + self._sources :])

    # --- looking ---

    def look(self, asked: bool, *raw: Any) -> list[Any]:
        """Updates for preview, estimate and ``looked``. ``asked``: by a click, so that no data is an error too."""
        data = _data(raw, self._sources)
        if not asked and not (data.path or data.text or data.hub):
            return ["", "", False]
        try:
            data, values = self._read(raw)
            preview = self._service.training.preview(data, values)
        except LoadstoneError as error:
            return [f'<div class="card failed">{error_box(error)}</div>', "", False]
        return [preview_card(preview), self._estimate(data, values, preview), True]

    def _estimate(self, data: Data, values: dict[str, Any], preview: Preview) -> str:
        try:
            return estimate_card(self._service.training.estimate(data, values, preview))
        except LoadstoneError as error:
            return error_box(error)

    def changed(self, looked: bool, *raw: Any) -> list[Any]:
        """An option was changed by hand: what is of no effect now, and what the data looks like now."""
        fields = field_updates(raw[1 + self._sources :])
        return [*fields, *(self.look(False, *raw) if looked else [gr.skip()] * 3)]

    # --- beginning ---

    def start(self, name: str, *raw: Any) -> list[Any]:
        return self._attempt(START, name, raw)

    def resume(self, run: str | None, name: str, *raw: Any) -> list[Any]:
        if not run:
            return self._attempted(small("Choose one first."))
        return self._attempt(RESUME + run, name, raw)

    def again(self, how: dict[str, bool], waiting: str, name: str, *raw: Any) -> list[Any]:
        """After a yes: the attempt that waited for it."""
        return self._attempt(waiting, name, raw, **how)

    def _attempt(
        self, what: str, name: str, raw: Sequence[Any], *, unload: bool = False, anyway: bool = False
    ) -> list[Any]:
        training = self._service.training
        try:
            if what.startswith(RESUME):
                training.resume(what.removeprefix(RESUME), unload=unload, anyway=anyway)
            elif what == START:
                data, values = self._read(raw)
                training.start(name, data, values, unload=unload, anyway=anyway)
        except MustUnload as error:
            loaded = self._service.snapshot().loaded
            words = f"Unload {loaded.order.name} and train" if loaded else "Train"
            return self._attempted(error_box(error), gr.update(visible=True, value=words), waiting=what)
        except OutOfMemory as error:
            return self._attempted(error_box(error), anyway=gr.update(visible=True), waiting=what)
        except LoadstoneError as error:
            return self._attempted(error_box(error))
        return self._attempted("")

    def _attempted(
        self, line: str, unload: Any = _HIDDEN, anyway: Any = _HIDDEN, waiting: str = ""
    ) -> list[Any]:  # fmt: skip
        """Updates for ``tab.follows_attempt`` and ``tab.follows_state``."""
        no = gr.update(visible=True if waiting else "hidden")
        return [line, unload, anyway, no, waiting, *state_updates(self._service)]

    def no(self) -> list[Any]:
        return self._attempted("")

    # --- while it runs, and afterwards ---

    def act(self, action: Callable[[], object]) -> list[Any]:
        """Updates for the line and ``tab.follows_state``."""
        try:
            action()
        except LoadstoneError as error:
            return [error_box(error), *state_updates(self._service)]
        return ["", *state_updates(self._service)]

    def ask_cancel(self) -> asking.Question | str:
        state = self._service.training.state()
        if not state.running:
            return "No training runs any more."
        return asking.Question(state.name, f"Cancel {state.name} and delete all that it has learned?")

    def cancel(self, name: str) -> list[Any]:
        state = self._service.training.state()
        if state.running and state.name == name:
            return self.act(self._service.training.cancel)
        return [small(f"{name} has ended already; nothing was deleted."), *state_updates(self._service)]

    def ask_discard(self, run: str | None) -> asking.Question | str:
        if not run:
            return "Choose one first."
        return asking.Question(run, f"Delete the unfinished training {run} with its checkpoints?")

    def discard(self, run: str) -> list[Any]:
        return self.act(lambda: self._service.training.discard(run))

    def _apply(self) -> None:
        name = self._service.training.state().name
        if [choice.name for choice in self._service.loras.active] != [name]:
            self._service.loras.apply([name])

    def apply(self) -> list[Any]:
        updates = self.act(self._apply)
        name = self._service.training.state().name
        return [updates[0] or small(f"{name} is applied: the model answers with it."), *updates[1:]]

    def compare(self) -> list[Any]:
        """Updates for the line, the state, the tabs and the Chat tab's second answer."""
        updates = self.act(self._apply)
        if updates[0]:
            return [*updates, gr.skip(), gr.skip()]
        return [*updates, gr.update(selected="chat"), chat_loras.BASE]

    def fix(self) -> list[Any]:
        """Load the model again with what makes training possible."""

        def reload() -> None:
            problem, loaded = self._service.training.problem({}), self._service.snapshot().loaded
            if problem is not None and loaded is not None:
                options = {name: value for name, value in changed(loaded.order.options).items() if name != "model"}
                self._service.load(loaded.order.name, {**options, **problem.fix})

        return self.act(reload)


def wire(tab: TrainingTab, service: Service, tabs: gr.Tabs, beside: gr.Dropdown) -> None:
    """Connect the tab's widgets to the service. ``tabs`` and ``beside``: where an answer is compared."""
    actions = Actions(tab, service)
    _wire_looking(tab, actions)
    tab.remembered.keep()
    attempt, state = [*tab.follows_attempt, *tab.follows_state], [tab.line, *tab.follows_state]
    named = [tab.name, *tab.inputs]
    gr.on([tab.start.click, tab.name.submit], actions.start, named, attempt, **DIRECT)
    tab.resume.click(actions.resume, [tab.run, *named], attempt, **DIRECT)
    waiting = [tab.waiting, *named]
    tab.unload.click(partial(actions.again, {"unload": True}), waiting, attempt, **DIRECT)
    tab.anyway.click(partial(actions.again, {"anyway": True}), waiting, attempt, **DIRECT)
    tab.no.click(actions.no, None, attempt, **DIRECT)
    for button, action in ((tab.pause, service.training.pause), (tab.keep, service.training.stop_and_keep)):
        button.click(partial(actions.act, action), None, state, **DIRECT)
    back = [f"#{tab.resume.elem_id}", f"#{tab.start.elem_id}"]
    asking.wire(tab.cancelling, tab.cancel, actions.ask_cancel, None, actions.cancel, [], state, back=back)
    asking.wire(tab.discarding, tab.discard, actions.ask_discard, tab.run, actions.discard, [], state, back=back)
    tab.apply.click(actions.apply, None, state, **DIRECT)
    tab.compare.click(actions.compare, None, [*state, tabs, beside], **DIRECT)
    tab.fix.click(actions.fix, None, state, **DIRECT)
    perplexity_card.wire(tab.perplexity, service)


def _wire_looking(tab: TrainingTab, actions: Actions) -> None:
    """A look by a click, and by itself where data was given; again where an option changes what it shows."""
    shown: dict[str, Any] = {"queue": False, "show_progress": "minimal", "show_progress_on": tab.preview, **PRIVATE}
    seen = [tab.preview, tab.estimate, tab.looked]
    looked = tab.look.click(partial(actions.look, True), tab.inputs, seen, **shown)
    looked.then(None, None, None, js=_TO_PREVIEW)  # on a phone it lies below the options
    source = tab.source
    given = [source.upload.change, source.paste.blur, tab.data_format.input]
    on_latest(given, partial(actions.look, False), tab.inputs, seen, **shown)
    options = [*tab.fields.values()]
    on_latest(edits(options), actions.changed, [tab.looked, *tab.inputs], [*options, *seen])


def wire_opening(page: gr.Blocks, tab: TrainingTab) -> None:
    """When the page is opened: what this browser remembers, and what is of no effect with it."""
    fields = [*tab.fields.values()]
    tab.remembered.recover(page).then(lambda *raw: field_updates(raw), fields, fields, **DIRECT)


def follow(events: Sequence[Any], tab: TrainingTab, service: Service) -> None:
    """Show how trainings and measurements stand, on each of ``events``: the page is opened, something has changed,
    the tab is shown, before which Gradio 6.31 forgets that what it has not drawn yet is to be visible."""
    outputs = [*tab.follows_state, *tab.perplexity.follows_state, *tab.cancelling.place]

    def synced() -> list[Any]:
        over = asking.shown("") if not service.training.state().running else [gr.skip()] * len(tab.cancelling.place)
        return [*state_updates(service), *perplexity_card.state_updates(service), *over]

    on_latest(events, synced, None, outputs)
