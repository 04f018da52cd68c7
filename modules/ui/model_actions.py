"""What a click on the Model tab does, and which widget it belongs to."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import gradio as gr

from modules.errors import LoadstoneError
from modules.options import LOAD_OPTIONS, alpha_for
from modules.options.loader import may_stretch
from modules.service import Service
from modules.ui import asking, cards
from modules.ui.common import DIRECT, QUIET, edits, guarded, inform, on_latest, warn
from modules.ui.form import form_updates, form_values
from modules.ui.model_tab import (
    ModelTab,
    mendable,
    menu_update,
    model_choices,
    selected_outputs,
    show_selected,
    state_updates,
    view_updates,
)

POLL_S = 0.25
# On the page alone, and once what was chosen stands there, and not what was chosen before it: it is loaded where that
# was wished, and it is not loaded yet. Not by a click on Load, which is greyed while something is under way: then it
# has to be said that this is so.
_AUTOLOAD = """(wished, model) => {
  const shown = document.querySelector("#summary [data-model]")?.dataset;
  if (wished && shown?.model === model && shown.loaded === undefined)
    setTimeout(() => document.getElementById("autoloads").click(), 50) }"""
# The menu tells of a choice twice, and on being left without one: only another model than the one chosen last is a
# choice. At first that is the one shown; later what is shown may be the answer to an earlier choice still.
_CHOSEN = """(model, chosen) =>
  model === (chosen || document.querySelector("#summary [data-model]")?.dataset.model) ? chosen : model"""
# What changes the form or what is saved, and may pop up a message, goes one after another in the order of the clicks.
_IN_ORDER: dict[str, Any] = {"concurrency_id": "form", "concurrency_limit": 1, **QUIET}


def changed(
    tab: ModelTab, service: Service, model: str | None, *raw: Any, shows_code: bool = False
) -> list[Any]:  # fmt: skip
    """Updates for ``tab.follows_view``: what applies now, what fits now. No value is touched."""
    try:
        view = service.view(model or "", form_values(tab.form, raw))
    except LoadstoneError as error:
        view = replace(service.view(model or ""), problem=error, fit=None)  # what would fit then, nobody knows
    return view_updates(tab, service, view, with_values=False, shows_code=shows_code)


def _unrefused(
    tab: ModelTab, service: Service, refused: tuple[Any, ...] | None, model: str | None, *raw: Any
) -> list[Any]:
    """Updates for ``tab.follows_refusal`` and ``refused``, the values that a load was refused with. A load with others
    is another one, for which that is of no interest."""
    if refused is None or refused == raw:
        return [gr.skip()] * (len(tab.follows_refusal) + 1)
    updates = dict(zip(tab.follows_state, state_updates(service, model), strict=True))
    return [*(updates[widget] for widget in tab.follows_refusal), None]


def _edited(
    tab: ModelTab, service: Service, refused: tuple[Any, ...] | None, model: str | None, *raw: Any
) -> list[Any]:
    """An option was changed by hand."""
    return [*changed(tab, service, model, *raw), *_unrefused(tab, service, refused, model, *raw)]


def _follow(service: Service, model: str | None) -> Iterator[list[Any]]:
    """State updates until the load that was just asked for has ended, and that it was not refused."""
    while True:
        snapshot = service.snapshot()
        yield [*state_updates(service, model), None]
        if not cards.busy(snapshot):
            return
        service.supervisor.wait(snapshot.version, POLL_S)


def _load(tab: ModelTab, service: Service, model: str | None, *raw: Any, anyway: bool = False) -> Iterator[list[Any]]:
    yield from _act(service, lambda: service.load(model or "", form_values(tab.form, raw), anyway=anyway), model, *raw)


def _act(service: Service, action: Callable[[], object], model: str | None, *raw: Any) -> Iterator[list[Any]]:
    """Updates for ``tab.follows_state`` and ``tab.refused``."""
    try:
        action()
    except LoadstoneError as error:
        warn(error)
        yield [*state_updates(service, model, error), raw]
        return
    yield from _follow(service, model)


def _fixed(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """The form with the changes that the error on the card proposes for this model."""
    values = form_values(tab.form, raw)
    error, _ = mendable(service, model)
    fix = error.fix if error else {}
    try:
        service.order(model or "", values)
    except LoadstoneError as refused:
        fix = refused.fix
    values.update({name: value for name, value in fix.items() if name in LOAD_OPTIONS})
    return form_updates(tab.form, service.view(model or "", values), with_values=True)


def _with(tab: ModelTab, service: Service, model: str | None, values: dict[str, Any]) -> list[Any]:
    return view_updates(tab, service, service.view(model or "", values), with_values=True)


def _stretched(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """The form with the alpha_value that suits the context asked for."""
    values = form_values(tab.form, raw)
    view = service.view(model or "", values)
    if view.facts and view.facts.context_tokens and may_stretch(view.options):
        values["alpha_value"] = alpha_for(view.context_tokens / view.facts.context_tokens)
    return _with(tab, service, model, values)


def _take_way(tab: ModelTab, service: Service, place: int, model: str | None, *raw: Any) -> list[Any]:
    """The form with the changes of one suggestion."""
    values = form_values(tab.form, raw)
    view = service.view(model or "", values)
    ways = [suggestion for suggestion in view.fit.plan.suggestions if suggestion.options] if view.fit else []
    if place < len(ways):
        values.update(ways[place].options)
    return _with(tab, service, model, values)


def _allow_and_load(
    tab: ModelTab, service: Service, shown: dict[str, str], model: str | None, *raw: Any
) -> Iterator[list[Any]]:
    """Allow the Python files as they were shown, and load."""

    def act() -> None:
        service.allow_code(model or "", shown)
        service.load(model or "", form_values(tab.form, raw))

    yield from _act(service, act, model, *raw)


def _forget_code(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """Take back the yes to the model's Python files. What is loaded goes on."""
    service.forget_code(model or "")
    inform(f"The Python files of {model} ask again before the next load.")
    return changed(tab, service, model, *raw, shows_code=True)


def _looked(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    """The model's Python files as they are now, and whether they are allowed; no value is touched."""
    return changed(tab, service, model, *raw, shows_code=True)


def _save(tab: ModelTab, service: Service, model: str | None, *raw: Any) -> list[Any]:
    path = service.save_settings(model or "", form_values(tab.form, raw))
    inform(f"Saved for {model} in {path.parent.name}/{path.name}.")
    return view_updates(tab, service, service.view(model or ""), with_values=True)


def _ask_forget(service: Service, model: str | None) -> asking.Question | str:
    if not model:
        return "Choose a model first."
    if not service.settings.path_of(model).exists():
        return f"Nothing is saved for {model}."
    return asking.Question(model, f"Forget the settings saved for {model}?")


def _forget(tab: ModelTab, service: Service, asked: str, model: str | None) -> list[Any]:
    service.settings.forget(asked)
    if model != asked:  # what is in the form is another's
        return [gr.skip()] * len(tab.follows_view)
    return view_updates(tab, service, service.view(model or ""), with_values=True)


def _import(tab: ModelTab, service: Service, model: str | None) -> list[Any]:
    plan = service.settings.importable(model_choices(service))
    service.settings.import_legacy(plan)
    count = len(plan.values)
    left_out = f" Not understood: {', '.join(plan.left_out)}." if plan.left_out else ""
    inform(f"Imported settings for {count} model{'s' if count != 1 else ''}.{left_out}")
    return [gr.update(visible="hidden"), *view_updates(tab, service, service.view(model or ""), with_values=True)]


def _refresh(service: Service, model: str | None) -> Any:
    choices = model_choices(service)
    return menu_update(service, choices, model)


def wire(tab: ModelTab, service: Service, page: gr.Tab) -> None:
    """Connect the widgets of ``page`` to the service. Its menu is as new as the moment it is opened."""
    inputs = [tab.model, *tab.form.widgets]
    shown = len(tab.follows_view)

    def bound(action: Callable[..., Any], outputs: int = shown) -> Callable[..., Any]:
        return guarded(outputs, partial(action, tab, service))

    viewed, load = partial(changed, tab, service), partial(_load, tab, service)
    tab.model.input(None, [tab.model, tab.chosen], tab.chosen, js=_CHOSEN, **QUIET)
    selected = on_latest(
        [tab.chosen.change], partial(show_selected, tab, service), tab.model, selected_outputs(tab)
    )  # fmt: skip
    selected.then(None, [tab.autoload, tab.model], None, js=_AUTOLOAD)
    gr.on(
        [tab.model.input, tab.autoload.input],
        lambda model, autoload: {"model": model, "autoload": autoload},
        [tab.model, tab.autoload], tab.remembered, **DIRECT,
    )  # fmt: skip
    on_latest(
        [*edits(tab.form.widgets), tab.loras.typed.change], partial(_edited, tab, service), [tab.refused, *inputs],
        [*tab.follows_view, *tab.follows_refusal, tab.refused],
    )  # fmt: skip
    _wire_loading(tab, service, inputs, viewed, load)
    page.select(partial(_refresh, service), tab.model, tab.model, **DIRECT)
    filled = [
        tab.stretch.click(bound(_stretched), inputs, tab.follows_view, **_IN_ORDER),
        *(
            way.click(guarded(shown, partial(_take_way, tab, service, place)), inputs, tab.follows_view, **_IN_ORDER)
            for place, way in enumerate(tab.ways)
        ),
    ]
    for event in filled:  # leaving a field by the click may have asked for what stood there before it
        event.then(viewed, inputs, tab.follows_view, **DIRECT)
    tab.save.click(bound(_save), inputs, tab.follows_view, **_IN_ORDER)
    asking.wire(
        tab.forgetting, tab.forget, partial(_ask_forget, service), tab.model, partial(_forget, tab, service),
        [tab.model], tab.follows_view, acts=_IN_ORDER,
    )  # fmt: skip
    tab.chosen.change(lambda: asking.shown(""), None, tab.forgetting.place, **DIRECT)  # it was about another model
    tab.import_legacy.click(bound(_import, shown + 1), tab.model, [tab.import_legacy, *tab.follows_view], **_IN_ORDER)


def _wire_loading(
    tab: ModelTab, service: Service, inputs: list[Any], viewed: Callable[..., Any], load: Callable[..., Any]
) -> None:
    """The buttons that change what is loaded; afterwards what is free has changed."""
    acts: dict[str, Any] = {"outputs": [*tab.follows_state, tab.refused], **QUIET}
    submits = [field.submit for field in tab.form.widgets if hasattr(field, "submit")]
    fixed = guarded(len(tab.form.widgets), partial(_fixed, tab, service))
    acted = [
        gr.on([tab.load.click, *submits], load, inputs, **acts),
        tab.autoloads.click(load, inputs, trigger_mode="multiple", **acts),  # also while an earlier one goes on
        tab.anyway.click(partial(load, anyway=True), inputs, **acts),
        tab.fix.click(fixed, inputs, tab.form.widgets, **_IN_ORDER).then(load, inputs, **acts),
        tab.allow_code.click(lambda: True, None, tab.form.fields["trust_remote_code"], **_IN_ORDER)
        .then(partial(_allow_and_load, tab, service), [tab.shown_code, *inputs], **acts)
        .then(partial(_looked, tab, service), inputs, tab.follows_view, **DIRECT),
        *(
            button.click(partial(_act, service, action), tab.model, **acts)
            for button, action in (
                (tab.unload, service.unload), (tab.reload, service.reload), (tab.cancel, service.cancel),
            )
        ),
        tab.refresh.click(partial(_refresh, service), tab.model, tab.model, **DIRECT),
    ]  # fmt: skip
    code_forgotten = guarded(len(tab.follows_view), partial(_forget_code, tab, service))
    tab.forget_code.click(lambda: False, None, tab.form.fields["trust_remote_code"], **_IN_ORDER).then(
        code_forgotten, inputs, tab.follows_view, **_IN_ORDER
    )
    for event in acted:
        event.then(viewed, inputs, tab.follows_view, **DIRECT)
