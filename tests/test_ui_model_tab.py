"""The Model tab's buttons, as the page would show them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
import pytest

from modules.ui import model_actions, model_tab
from modules.ui.form import form_updates
from tests.services import services


@pytest.mark.parametrize(
    ("values", "offered", "alpha"),
    [
        ({}, True, 1.75),
        ({"alpha_value": 1.2}, True, 1.75),
        ({"rope_freq_base": 1e6}, False, 1.0),
        ({"compress_pos_emb": 1.2}, False, 1.0),
    ],
)
def test_the_context_is_stretched_by_a_click_only_where_that_is_not_refused(
    tmp_path: Path, demo_model: Path, values: dict[str, Any], offered: bool, alpha: float
) -> None:
    with services(tmp_path, demo_model) as make, gr.Blocks():
        service = make()
        tab = model_tab.build(service)
        form = {"ctx_size": 12_288, **values}
        updates = model_tab.view_updates(tab, service, service.view("demo", form), with_values=False)
        stretch = dict(zip(tab.follows_view, updates, strict=True))[tab.stretch]
        assert (stretch["visible"] is True) == offered
        filled = form_updates(tab.form, service.view("demo", form), with_values=True)
        typed = [update["value"] for update in filled]
        clicked = model_actions._stretched(tab, service, "demo", *typed)
        assert clicked[tab.form.widgets.index(tab.form.fields["alpha_value"])]["value"] == alpha


def test_reload_is_there_wherever_there_is_something_to_load_again(tmp_path: Path, demo_model: Path) -> None:
    with services(tmp_path, demo_model) as make, gr.Blocks():
        service = make()
        tab = model_tab.build(service)

        def shown() -> tuple[bool, bool, str]:
            updates = dict(zip(tab.follows_state, model_tab.state_updates(service, "demo"), strict=True))
            return updates[tab.unload]["interactive"], updates[tab.reload]["interactive"], str(updates[tab.card])

        assert shown()[:2] == (False, False)
        service.load("demo", {"ctx_size": 64})
        assert shown()[:2] == (False, False)  # busy
        service.supervisor.wait_loaded(60)
        assert shown()[:2] == (True, True)
        service.supervisor.unload(idle=True)
        unload, reload, card = shown()
        assert (unload, reload) == (False, True)
        assert 'data-last="demo"' in card
        assert "demo was unloaded because nobody used it." in card
