"""The Model tab: pick a model, see what it is and whether it fits, set options, load it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from modules.errors import CustomCodeRefused, LoadstoneError
from modules.options import LoadOptions, alpha_for
from modules.options.loader import may_stretch
from modules.service import Service, View
from modules.supervisor import LOAD_STATES, Snapshot, State
from modules.ui import asking, cards, download_card, lora_card
from modules.ui.fixes import fix_label
from modules.ui.form import Form, build_form, form_updates, group_updates

MOST_WAYS = 4


@dataclass(frozen=True)
class ModelTab:
    """The widgets that other parts of the page need."""

    model: gr.Dropdown
    chosen: gr.Textbox  # the model as it was last chosen by hand; hidden. The menu tells of a choice twice, and of none
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
    forgetting: asking.Asking
    import_legacy: gr.Button
    autoloads: gr.Button  # hidden; the page clicks it when what was chosen is to be loaded by itself
    fix: gr.Button
    allow_code: gr.Button
    forget_code: gr.Button  # takes the yes to the files back
    stretch: gr.Button
    ways: tuple[gr.Button, ...]
    anyway: gr.Button
    summary: gr.HTML
    fit: gr.HTML
    card: gr.HTML
    code: gr.HTML
    refused: gr.State  # the form's values that a load was refused with; None: none was
    shown_code: gr.State  # the Python files as they were shown: name → SHA-256
    downloads: download_card.DownloadCard
    loras: lora_card.LoraCard

    @property
    def follows_state(self) -> list[Any]:
        """What :func:`state_updates` updates."""
        buttons = [self.load, self.unload, self.reload, self.cancel, self.fix, self.allow_code]
        return [self.card, *buttons, *self.loras.follows_state]

    @property
    def follows_refusal(self) -> list[Any]:
        """The part of ``follows_state`` that tells why a load was refused, and mends it."""
        return [self.card, self.fix, self.allow_code]

    @property
    def follows_view(self) -> list[Any]:
        """What :func:`view_updates` updates. The page applies this in order: who sees the summary sees all of it."""
        return [
            *self.form.widgets, self.stretch, *self.ways, self.anyway, self.shown_code, self.code,
            self.forget_code, self.fit, self.summary,
        ]  # fmt: skip


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
            forget = gr.Button("Forget saved …", size="sm", elem_id="forget", min_width=90)
            legacy = gr.Button(
                "Import from config-user.yaml", size="sm", elem_id="import", visible="hidden", min_width=90
            )
    forgetting = asking.build("forget", "forget them", "keep them")
    with gr.Row(equal_height=False):
        with gr.Column(scale=6, min_width=320):
            form = build_form()
            stretch = gr.Button("Stretch the context", size="sm", visible="hidden", elem_id="stretch")
            code = gr.HTML(elem_id="code", padding=False)
            forget_code = gr.Button("Allow them no more", size="sm", visible="hidden", elem_id="forget-code")
            loras = lora_card.build()
        with gr.Column(scale=5, min_width=320, elem_id="state-column"):
            card, fix, allow, fit, ways, anyway = _state_widgets()
            downloads = download_card.build()
    with gr.Row(elem_classes="unseen"):
        chosen = gr.Textbox("", label="Model chosen")
        autoloads = gr.Button("load", elem_id="autoloads")
    remembered = gr.BrowserState({"model": "", "autoload": False}, storage_key="loadstone-model", secret="loadstone")
    return ModelTab(
        model, chosen, autoload, remembered, form, load, unload, reload, cancel, refresh, save, forget, forgetting,
        legacy, autoloads, fix, allow, forget_code, stretch, ways, anyway, summary, fit, card, code, gr.State(),
        gr.State({}), downloads, loras,
    )  # fmt: skip


def _state_widgets() -> tuple[gr.HTML, gr.Button, gr.Button, gr.HTML, tuple[gr.Button, ...], gr.Button]:
    """What is loaded and what would fit, with the buttons that mend what is wrong."""
    card = gr.HTML(elem_id="card", padding=False)
    fix = gr.Button("", variant="primary", size="sm", visible="hidden", elem_id="fix")
    allow = gr.Button("Allow these files and load", size="sm", visible="hidden", elem_id="allow-code")
    fit = gr.HTML(elem_id="fit", padding=False)
    ways = tuple(
        gr.Button("", size="sm", visible="hidden", elem_id=f"way-{place}", elem_classes="way")
        for place in range(MOST_WAYS)
    )
    anyway = gr.Button("Load anyway", size="sm", variant="stop", visible="hidden", elem_id="anyway")
    return card, fix, allow, fit, ways, anyway


# --- what the widgets show ---


def view_updates(
    tab: ModelTab, service: Service, view: View, *, with_values: bool, shows_code: bool = False
) -> list[Any]:
    """Updates for ``tab.follows_view``.

    ``shows_code``: the model's Python files are shown as they are now. Only where a person looks at the model anew:
    a yes is a yes to the files that stood there when it was given, not to what replaced them a moment before.
    """
    limit = view.facts.context_tokens if view.facts else 0
    alpha = alpha_for(view.context_tokens / limit) if limit and view.context_tokens > limit else 1.0
    needs_alpha = alpha > view.options.alpha_value and "alpha_value" not in view.reasons
    stretch = gr.update(
        visible=True if needs_alpha and may_stretch(view.options) else "hidden",
        value=f"Stretch the context to {view.context_tokens:,}: alpha_value {alpha:g}",
    )
    return [
        *form_updates(tab.form, view, with_values=with_values),
        stretch,
        *_way_updates(view),
        *(_code_updates(view) if shows_code else [gr.skip()] * 3),
        cards.fit_card(view, service.measure()),
        cards.summary(view, service.snapshot().loaded),
    ]


def _code_updates(view: View) -> list[Any]:
    return [
        {file.name: file.sha256 for file in view.facts.code_files} if view.facts else {},
        cards.code_list(view),
        gr.update(visible=True if view.code_approved else "hidden"),
    ]


def _way_updates(view: View) -> list[Any]:
    """The ways that would make it fit, a button each; and the button to load anyway, which says what it risks."""
    plan = view.fit.plan if view.fit else None
    texts = [suggestion.text for suggestion in plan.suggestions if suggestion.options] if plan else []
    updates = [gr.update(visible=True, value=text) for text in texts[:MOST_WAYS]]
    updates += [gr.update(visible="hidden", value="")] * (MOST_WAYS - len(updates))
    risk = "Load anyway: memory may run out, then the model's process ends and the page stays"
    return [*updates, gr.update(visible=True if plan and not plan.fits else "hidden", value=risk)]


def state_updates(service: Service, model: str | None, refused: LoadstoneError | None = None) -> list[Any]:
    """Updates for ``tab.follows_state``. ``refused``: why the model was not even begun to be loaded.

    The buttons that mend an error are there only while the model is selected that it is about.
    """
    snapshot = service.snapshot()
    busy = cards.busy(snapshot)
    card = cards.status_card(snapshot)
    if above := refused or service.start_error:
        card = f'<div class="card failed">{cards.error_box(above)}</div>{card}'
    error, options = (refused, None) if refused else mendable(service, model)
    return [
        card,
        gr.update(interactive=not busy),
        gr.update(interactive=snapshot.loaded is not None and not busy),
        gr.update(interactive=snapshot.last is not None and not busy),
        gr.update(visible=True if snapshot.state in (State.STARTING, State.LOADING) else "hidden"),
        gr.update(visible=True if error and error.fix else "hidden", value=fix_label(error, options)),
        gr.update(visible=True if isinstance(error, CustomCodeRefused) else "hidden"),
        *lora_card.state_updates(service, model),
    ]


def mendable(service: Service, model: str | None) -> tuple[LoadstoneError | None, LoadOptions | None]:
    """The error of the selected model's last load, and the options of that load where they are known."""
    if service.start_error and service.start_error_for == model:
        return service.start_error, None
    snapshot = service.snapshot()
    if snapshot.state is State.FAILED and snapshot.order is not None and snapshot.order.name == model:
        return snapshot.error, snapshot.order.options
    return None, None


def model_choices(service: Service) -> list[str]:
    """The models' names, favourites first."""
    favourites = service.shelf.marks.favourites()
    return sorted((model.name for model in service.models()), key=lambda name: name not in favourites)


def labelled(service: Service, names: list[str]) -> list[tuple[str, str]]:
    """The menu's entries: each name with its badge; a favourite with a star."""
    badges, favourites = service.badges(), service.shelf.marks.favourites()
    stars = {name: "★ " if name in favourites else "" for name in names}
    return [(f"{stars[name]}{name} · {badges[name]}" if name in badges else stars[name] + name, name) for name in names]


def menu_update(service: Service, choices: list[str], model: str | None) -> Any:
    """New entries for the menu. What is chosen stays, and is not said: another may have been chosen meanwhile."""
    gone = {} if not model or model in choices else {"value": None}
    return gr.update(choices=labelled(service, choices), **gone)


def show_selected(tab: ModelTab, service: Service, model: str | None) -> list[Any]:
    """A model was chosen: the options that it is loaded with, or else its own; its facts."""
    view = service.view(model or "", _loaded_options(service.snapshot(), model))
    return [
        *group_updates(tab.form, view),
        *state_updates(service, model),
        *view_updates(tab, service, view, with_values=True, shows_code=True),
    ]


def _loaded_options(snapshot: Snapshot, model: str | None) -> dict[str, Any]:
    """The options of the model's load that is under way, or has failed, or by which it answers; empty where there is
    none. What Load would change is seen so."""
    under_way = snapshot.order if snapshot.state in (*LOAD_STATES, State.FAILED) else None
    orders = [under_way, snapshot.loaded.order if snapshot.loaded else None]
    return next((vars(order.options) for order in orders if order is not None and order.name == model), {})


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
        gr.update(choices=labelled(service, choices), value=chosen),
        gr.update(value=bool((remembered or {}).get("autoload"))),
        gr.update(visible=True if plan.values else "hidden"),
        *show_selected(tab, service, chosen),
    ]


def opened_outputs(tab: ModelTab) -> list[Any]:
    return [tab.model, tab.autoload, tab.import_legacy, *selected_outputs(tab)]


def selected_outputs(tab: ModelTab) -> list[Any]:
    return [*tab.form.groups.values(), *tab.follows_state, *tab.follows_view]
