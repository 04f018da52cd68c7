"""Whatever stands in a model's config.json, the page has something to say of it."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests import checkpoints
from tests.services import services

ODD: tuple[Any, ...] = (-1, 10**49, "word", [], [[1]], {}, None)  # each where something else is expected
OFTEN = (
    "layer_types",
    "rope_scaling",
    "quantization_config",
    "auto_map",
    "head_dim",
    "kv_lora_rank",
    "n_routed_experts",
)


def paths(config: Mapping[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The keys of a configuration, those within others after them."""
    for key, value in config.items():
        yield (*before, key)
        if isinstance(value, Mapping):
            yield from paths(value, (*before, key))


def with_value(config: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = place = copy.deepcopy(config)
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return changed


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_whatever_one_field_holds_the_page_shows_the_model(kind: str, tmp_path: Path, demo_model: Path) -> None:
    with services(tmp_path, demo_model) as make:
        service = make()
        file = checkpoints.copied(getattr(checkpoints, kind)(), tmp_path / "models" / "odd") / "config.json"
        whole = json.loads(file.read_text())
        for number, path in enumerate({*paths(whole), *((key,) for key in OFTEN)}):
            for place, value in enumerate(ODD):
                file.write_text(json.dumps(with_value(whole, path, value)))
                os.utime(file, ns=(0, 10**9 * (1 + number * len(ODD) + place)))  # a new file each time
                view = service.view("odd")
                assert view.name == "odd", (path, value)
                assert view.facts is not None or view.problem is not None, (path, value)
