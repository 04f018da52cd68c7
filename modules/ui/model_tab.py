"""The Model tab: pick a model, see what it is and whether it fits, set options, load it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import gradio as gr

from modules.errors import CustomCodeRefused, LoadstoneError
from modules.options import LOAD_OPTIONS, alpha_for
from modules.service import Service, View
from modules.supervisor import Snapshot, State
from modules.ui import cards
from modules.ui.form import Form, build_form, form_updates, form_values, group_updates, widget_value

POLL_S = 0.25
MOST_WAYS = 4
PRIVATE = {"api_visibility": "private"}
QUIET = {"show_progress": "hidden", **PRIVATE}


@dataclass(frozen=True)
class ModelTab:
    """The widgets that other parts of the page need."""

    model: gr.Dropdown
    autoload: gr.Checkbox
    remembered: gr.BrowserState
    form: Form
    load: gr.Button
    unload: gr.Button
    reload: gr.Button
    cancel: gr.Button
    refresh: gr.Button
    save: gr.Button
    forget: gr.Button
    import_legacy: gr.Button
    fix: gr.Button
    allow_code: gr.Button
    stretch: gr.Button
    ways: tuple[gr.Button, ...]
    anyway: gr.Button
    summary: gr.HTML
    fit: gr.HTML
    card: gr.HTML
    code: gr.HTML

    @property
    def follows_state(self) -> list[Any]:
        """What :func:`state_updates` updates."""
        return [self.card, self.load, self.unload, self.reload, self.cancel, self.fix, self.allow_code]

    @property
    def follows_view(self) -> list[Any]:
        """What :func:`view_updates` updates."""
        return [self.summary, self.fit, self.code, self.stretch, *self.ways, self.anyway, *self.form.widgets]


def build(service: Service) -> ModelTab:
    """Lay out the tab. Nothing is wired yet; see :func:`wire`."""
    with gr.Row(equal_height=False, elem_id="model-row"):
        model = gr.Dropdown(choices=[], label="Model", elem_id="model", scale=4, interactive=True, min_width=220)
        with gr.Row(elem_id="model-buttons", scale=5):
            refresh = gr.Button("⟳", elem_id="refresh", min_width=40)
            load = gr.Button("Load", variant="primary", elem_id="load", min_width=70)
            unload = gr.Button("Unload", elem_id="unload", min_width=70, interactive=False)
            reload = gr.Button("Reload", elem_id="reload", min_width=70, interactive=False)
            cancel = gr.Button("Cancel", variant="stop", elem_id="cancel", min_width=70, visible="hidden")
    with gr.Row(elem_id="summary-row"):
        summary = gr.HTML(elem_id="summary", padding=False)
        with gr.Row(elem_id="save-buttons"):
            autoload = gr.Checkbox(label="Autoload when selected", elem_id="autoload", container=False, min_width=170)
            save = gr.Button("Save settings", size="sm", elem_id="save", min_width=90)
            forget = gr.Button("Forget saved", size="sm", elem_id="forget", min_width=90)
            legacy = gr.Button("Import settings", size="sm", elem_id="import", visible="hidden", min_width=90)
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            form = build_form()
            stretch = gr.Button("Stretch the context", size="sm", visible="hidden", elem_id="stretch")
            code = gr.HTML(elem_id="code", padding=False)
        with gr.Column(scale=5, min_width=320, elem_id="state-column"):
            card = gr.HTML(elem_id="card", padding=False)
            fix = gr.Button("", variant="primary", size="sm", visible="hidden", elem_id="fix")
            allow = gr.Button("Allow these files and load", size="sm", visible="hidden", elem_id="allow-code")
            fit = gr.HTML(elem_id="fit", padding=False)
            ways = tuple(
                gr.Button("", size="sm", visible="hidden", elem_id=f"way-{place}", elem_classes="way")
                for place in range(MOST_WAYS)
            )
            anyway = gr.Button("Load anyway", size="sm", variant="stop", visible="hidden", elem_id="anyway")
    remembered = gr.BrowserState({"model": "", "autoload": False}, storage_key="loadstone-model", secret="loadstone")
    return ModelTab(
        model, autoload, remembered, form, load, unload, reload, cancel, refresh, save, forget, legacy,
        fix, allow, stretch, ways, anyway, summary, fit, card, code,
    )  # fmt: skip


# --- what the widgets show ---


def view_updates(tab: ModelTab, service: Service, view: View, *, with_values: bool) -> list[Any]:
    """Updates for ``tab.follows_view``."""
    limit = view.facts.context_tokens if view.facts else 0
    alpha = alpha_for(view.context_tokens / limit) if limit and view.context_tokens > limit else 1.0
    needs_alpha = alpha > view.options.alpha_value and "alpha_value" not in view.reasons
    stretch = gr.update(
        visible=True if needs_alpha and view.options.compress_pos_emb == 1 else "hidden",
        value=f"Stretch the context to {view.context_tokens:,}: alpha_value {alpha:g}",
    )
    return [
        cards.summary(view),
        cards.fit_card(view, service.measure()),
        cards.code_list(view),
        stretch,
        *_way_updates(view),
        *form_updates(tab.form, view, with_values=with_values),
    ]


def _way_updates(view: View) -> list[Any]:
    """The ways that would make it fit, a button each; and the button to load anyway, which says what it risks."""
    plan = view.fit.plan if view.fit else None
    texts = [suggestion.text for suggestion in plan.suggestions if suggestion.options] if plan else []
    updates = [gr.update(visible=True, value=text) for text in texts[:MOST_WAYS]]
    updates += [gr.update(visible="hidden", value="")] * (MOST_WAYS - len(updates))
    risk = "Load anyway: memory may run out, then the model's process ends and the page stays"
    return [*updates, gr.update(visible=True if plan and not plan.fits else "hidden", value=risk)]


def state_updates(snapshot: Snapshot) -> list[Any]:
    """Updates for ``tab.follows_state``."""
    busy = cards.busy(snapshot)
    error = snapshot.error if snapshot.state is State.FAILED else None
    return [
        cards.status_card(snapshot),
        gr.update(interactive=not busy),
        gr.update(interactive=snapshot.loaded is not None and not busy),
        gr.update(interactive=snapshot.loaded is not None and not busy),
        gr.update(visible=True if snapshot.state in (State.STARTING, State.LOADING) else "hidden"),
        gr.update(visible=True if error and error.fix else "hidden", value=_fix_label(error)),
        gr.update(visible=True if isinstance(error, CustomCodeRefused) else "hidden"),
    ]


def _fix_label(error: LoadstoneError | None) -> str:
    if not error or not error.fix:
        return ""
    words = [
        f"{'with' if value else 'without'} {LOAD_OPTIONS[name].label}"
        if LOAD_OPTIONS[name].kind == "flag"
        else f"with {LOAD_OPTIONS[name].label} {widget_value(LOAD_OPTIONS[name], value)}"
        for name, value in error.fix.items()
        if name in LOAD_OPTIONS
    ]
    return f"Load {' and '.join(words)} instead"


def model_choices(service: Service) -> list[str]:
    return [model.name for model in service.models()]


def _labelled(service: Service, names: list[str]) -> list[tuple[str, str]]:
    """The menu's entries: each name with its badge."""
    badges = service.badges()
    return [(f"{name} · {badges[name]}" if name in badges else name, name) for name in names]


# --- what a click does ---


def _show_selected(tab: ModelTab, service: Service, model: str | None) -> list[Any]:
    """A model was chosen: its own options, its facts."""
    view = service.view(model or "")
    error = service.start_error
    state = refused_updates(service, error) if error else state_updates(service.snapshot())
    return [
        *view_updates(tab, service, view, with_values=True),
        *state,
        *group_updates(tab.form, view),
    ]


def _changed(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """An option was changed by hand: what applies now, what fits now. No value is touched."""
    try:
        values = form_values(tab.form, raw)
    except LoadstoneError as error:
        view = service.view(model or "")
        problem = View(**{**view.__dict__, "problem": error})
        return view_updates(tab, service, problem, with_values=False)
    return view_updates(tab, service, service.view(model or "", values), with_values=False)


def _follow(service: Service) -> Iterator[list[Any]]:
    """State updates until the load that was just asked for has ended."""
    snapshot = service.snapshot()
    while True:
        yield state_updates(snapshot)
        if not cards.busy(snapshot):
            return
        snapshot = service.supervisor.wait(snapshot.version, POLL_S)


def refused_updates(service: Service, error: LoadstoneError) -> list[Any]:
    """The card for what was refused before anything was touched: the running model stays as it is."""
    updates = state_updates(service.snapshot())
    fix, allow = bool(error.fix), isinstance(error, CustomCodeRefused)
    updates[0] = f'<div class="card failed">{cards.error_box(error)}</div>{updates[0]}'
    updates[5] = gr.update(visible=True if fix else "hidden", value=_fix_label(error))
    updates[6] = gr.update(visible=True if allow else "hidden")
    return updates


def _load(tab: ModelTab, service: Service, model: str | None, *raw: Any, anyway: bool = False) -> Iterator[list[Any]]:
    try:
        service.load(model or "", form_values(tab.form, raw), anyway=anyway)
    except LoadstoneError as error:
        yield refused_updates(service, error)
        return
    yield from _follow(service)


def _act(service: Service, action: Callable[[], None]) -> Iterator[list[Any]]:
    try:
        action()
    except LoadstoneError as error:
        yield refused_updates(service, error)
        return
    yield from _follow(service)


def _autoload(tab: ModelTab, service: Service, model: str | None, on: bool, *raw: Any) -> Iterator[list[Any]]:
    loaded = service.snapshot().loaded
    if on and model and not (loaded and loaded.order.name == model):
        yield from _load(tab, service, model, *raw)
    else:
        yield [gr.skip() for _ in tab.follows_state]  # a generator that yields nothing would empty the outputs


def _fixed(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """The form with the changes that the last error proposes."""
    values = form_values(tab.form, raw)
    error = service.snapshot().error
    try:
        service.order(model or "", values)
    except LoadstoneError as refused:
        error = refused
    values.update({name: value for name, value in (error.fix if error else {}).items() if name in LOAD_OPTIONS})
    return form_updates(tab.form, service.view(model or "", values), with_values=True)


def _stretched(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """The form with the alpha_value that suits the context asked for."""
    values = form_values(tab.form, raw)
    view = service.view(model or "", values)
    if view.facts and view.facts.context_tokens:
        values["alpha_value"] = alpha_for(view.context_tokens / view.facts.context_tokens)
    return view_updates(tab, service, service.view(model or "", values), with_values=True)


def _take_way(tab: ModelTab, service: Service, place: int, model: str | None, *raw: Any) -> list[Any]:
    """The form with the changes of one suggestion."""
    values = form_values(tab.form, raw)
    view = service.view(model or "", values)
    ways = [suggestion for suggestion in view.fit.plan.suggestions if suggestion.options] if view.fit else []
    if place < len(ways):
        values.update(ways[place].options)
    return view_updates(tab, service, service.view(model or "", values), with_values=True)


def _allow_code(service: Service, model: str | None) -> None:
    view = service.view(model or "")
    if view.facts:
        service.allow_code(view.name, {file.name: file.sha256 for file in view.facts.code_files})


def _save(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    try:
        path = service.save_settings(model or "", form_values(tab.form, raw))
    except LoadstoneError as error:
        gr.Warning(str(error), title=error.title)
        return [gr.skip() for _ in tab.follows_view]
    gr.Info(f"Saved for {model} in {path.parent.name}/{path.name}.")
    return view_updates(tab, service, service.view(model or ""), with_values=True)


def _forget(tab: ModelTab, service: Service, model: str | None) -> list[Any]:
    if model:
        service.settings.forget(model)
    return view_updates(tab, service, service.view(model or ""), with_values=True)


def _import(tab: ModelTab, service: Service, model: str | None) -> list[Any]:
    plan = service.settings.importable(model_choices(service))
    service.settings.import_legacy(plan)
    gr.Info(f"Imported settings for {len(plan.values)} models.")
    return [gr.update(visible="hidden"), *view_updates(tab, service, service.view(model or ""), with_values=True)]


def _refresh(service: Service, model: str | None) -> Any:
    choices = model_choices(service)
    return gr.update(choices=_labelled(service, choices), value=model if model in choices else None)


def opened(tab: ModelTab, service: Service, remembered: dict[str, Any]) -> list[Any]:
    """The page was opened: the menu, with what is loaded, or was asked for, or was chosen here last, selected."""
    choices = model_choices(service)
    snapshot = service.snapshot()
    wanted = [
        snapshot.order.name if snapshot.order else "",
        snapshot.loaded.order.name if snapshot.loaded else "",
        service.preselected,
        (remembered or {}).get("model", ""),
    ]
    if service.preselected and service.preselected not in choices:
        choices = [*choices, service.preselected]
    chosen = next((name for name in wanted if name in choices), choices[0] if len(choices) == 1 else None)
    plan = service.settings.importable(choices)
    return [
        gr.update(choices=_labelled(service, choices), value=chosen),
        gr.update(value=bool((remembered or {}).get("autoload"))),
        gr.update(visible=True if plan.values else "hidden"),
        *_show_selected(tab, service, chosen),
    ]


def opened_outputs(tab: ModelTab) -> list[Any]:
    return [tab.model, tab.autoload, tab.import_legacy, *_selected_outputs(tab)]


def _selected_outputs(tab: ModelTab) -> list[Any]:
    return [*tab.follows_view, *tab.follows_state, *tab.form.groups.values()]


def wire(tab: ModelTab, service: Service) -> None:
    """Connect the tab's widgets to the service."""
    inputs = [tab.model, *tab.form.widgets]
    bound = {fn: partial(fn, tab, service) for fn in (_load, _changed, _save, _forget, _import, _fixed, _stretched)}
    tab.refresh.click(partial(_refresh, service), tab.model, tab.model, **QUIET)
    selected = tab.model.input(partial(_show_selected, tab, service), tab.model, _selected_outputs(tab), **QUIET)
    selected.then(
        partial(_autoload, tab, service), [tab.model, tab.autoload, *tab.form.widgets], tab.follows_state, **QUIET
    )
    gr.on(
        [tab.model.input, tab.autoload.input],
        lambda model, autoload: {"model": model, "autoload": autoload},
        [tab.model, tab.autoload], tab.remembered, queue=False, **QUIET,
    )  # fmt: skip
    gr.on(
        [field.input for field in tab.form.widgets],
        bound[_changed], inputs, tab.follows_view, trigger_mode="always_last", **QUIET,
    )  # fmt: skip
    submits = [field.submit for field in tab.form.widgets if hasattr(field, "submit")]
    acted = [gr.on([tab.load.click, *submits], bound[_load], inputs, tab.follows_state, **QUIET)]
    for button, action in ((tab.unload, service.unload), (tab.reload, service.reload), (tab.cancel, service.cancel)):
        acted.append(button.click(partial(_act, service, action), None, tab.follows_state, **QUIET))
    for event in acted:  # what is free has changed
        event.then(bound[_changed], inputs, tab.follows_view, **QUIET)
    tab.fix.click(bound[_fixed], inputs, tab.form.widgets, **QUIET).then(
        bound[_load], inputs, tab.follows_state, **QUIET
    )
    tab.allow_code.click(partial(_allow_code, service), tab.model, None, **QUIET).then(
        bound[_load], inputs, tab.follows_state, **QUIET
    )
    for place, way in enumerate(tab.ways):
        way.click(partial(_take_way, tab, service, place), inputs, tab.follows_view, **QUIET)
    tab.anyway.click(partial(_load, tab, service, anyway=True), inputs, tab.follows_state, **QUIET)
    tab.stretch.click(bound[_stretched], inputs, tab.follows_view, **QUIET)
    tab.save.click(bound[_save], inputs, tab.follows_view, **QUIET)
    tab.forget.click(bound[_forget], tab.model, tab.follows_view, **QUIET)
    tab.import_legacy.click(bound[_import], tab.model, [tab.import_legacy, *tab.follows_view], **QUIET)
