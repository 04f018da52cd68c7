"""A yes to a model's Python files: what it stands in for, what goes before it, and how it is taken back."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from modules.errors import CustomCodeRefused
from modules.service import Service, Source
from modules.ui import cards, model_actions, model_tab
from modules.ui.form import form_updates
from tests.services import Make, coded_model, services


@pytest.fixture
def make(tmp_path: Path, demo_model: Path) -> Iterator[Make]:
    """A service on a home with the model ``coded``, which brings a file of Python."""
    with services(tmp_path, demo_model) as made:
        coded_model(tmp_path / "models" / "coded", demo_model)
        yield made


def allow(service: Service) -> None:
    service.allow_code("coded", {file.name: file.sha256 for file in service.library.facts("coded").code_files})


def whole_form(service: Service, **values: Any) -> dict[str, Any]:
    """What the page sends: every value as it stands in the form."""
    options = {**vars(service.view("coded").options), **values}
    return {name: value for name, value in options.items() if name != "model"}


def test_a_yes_stands_in_for_the_option_where_nobody_gave_that(make: Make) -> None:
    service = make()
    assert not service.view("coded").options.trust_remote_code
    allow(service)
    view = service.view("coded")
    assert (view.options.trust_remote_code, view.origin["trust_remote_code"]) == (True, "allowed code")
    for form in (None, {}, whole_form(service), {"trust_remote_code": True}):
        order = service.order("coded", form)
        assert order.custom_code_allowed
        assert list(order.code_hashes) == ["modeling.py"]


@pytest.mark.parametrize(
    ("argv", "settings", "saved"),
    [
        (("--no-trust-remote-code",), "", {}),
        ((), "trust_remote_code: false\n", {}),
        ((), "", {"trust_remote_code": False}),
    ],
    ids=["flag", "settings.yaml", "saved"],
)
def test_a_yes_does_not_count_where_the_option_was_turned_off(
    make: Make, argv: tuple[str, ...], settings: str, saved: dict[str, Any]
) -> None:
    service = make(argv, settings)
    allow(service)
    if saved:
        service.save_settings("coded", whole_form(service, **saved))
    assert not service.order("coded").custom_code_allowed
    assert not service.order("coded", whole_form(service)).custom_code_allowed
    assert service.view("coded").code_approved
    assert service.order("coded", {"trust_remote_code": True}).custom_code_allowed  # these very files, asked for


@pytest.mark.parametrize("source", ["page", "api"])
@pytest.mark.parametrize("argv", [(), ("--trust-remote-code",)])
def test_the_unticked_option_goes_before_a_yes(make: Make, argv: tuple[str, ...], source: Source) -> None:
    service = make(argv)
    allow(service)
    for form in ({"trust_remote_code": False}, whole_form(service, trust_remote_code=False)):
        order = service.order("coded", form, source)
        assert (order.custom_code_allowed, order.code_hashes) == (False, {})


def test_a_yes_that_was_taken_back_asks_again(make: Make) -> None:
    service = make()
    allow(service)
    service.forget_code("coded")
    service.forget_code("coded")  # there is none: nothing to do
    assert not service.order("coded").custom_code_allowed
    assert not service.view("coded").code_approved
    with pytest.raises(CustomCodeRefused, match=r"modeling\.py"):
        service.order("coded", {"trust_remote_code": True})


def test_settings_saved_while_the_code_was_allowed_do_not_keep_the_yes(make: Make) -> None:
    service = make()
    allow(service)
    service.save_settings("coded", whole_form(service, bf16=True))
    service.forget_code("coded")
    order = service.order("coded")
    assert (order.options.bf16, order.custom_code_allowed) == (True, False)


def test_the_page_shows_the_yes_with_a_button_that_takes_it_back(make: Make) -> None:
    service = make()
    with gr.Blocks():
        tab = model_tab.build(service)

        def shown() -> tuple[Any, str]:
            view = service.view("coded")
            updates = model_tab.view_updates(tab, service, view, with_values=True, shows_code=True)
            return dict(zip(tab.follows_view, updates, strict=True))[tab.forget_code]["visible"], cards.code_list(view)

        assert shown()[0] == "hidden"
        assert "allowed" not in shown()[1]
        allow(service)
        assert shown()[0] is True
        assert "allowed to run while" in shown()[1]
        values = form_updates(tab.form, service.view("coded"), with_values=True)
        updates = model_actions._forget_code(tab, service, "coded", *(update["value"] for update in values))
        assert dict(zip(tab.follows_view, updates, strict=True))[tab.forget_code]["visible"] == "hidden"
        assert shown()[0] == "hidden"
