"""Models whose layers see a window only answer many at once, and as alone."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from modules.library import Library
from modules.options import LoadOptions, kept_tokens
from modules.planner import plan, read_checkpoint
from modules.protocol import READ_AT_ONCE_EAGER, GenerateOrder
from modules.worker.batching.extents import Extents
from modules.worker.batching.row import Sequence
from modules.worker.batching.slabs import Slabs, own_cache
from tests.planner_checkpoints import checkpoint
from tests.services import MACHINE
from tests.worker.batches import Desk, Told, order, tiny_llama
from tests.worker.test_batching import by_transformers
from tests.worker.windowed import KINDS, windowed


def texts(told: list[Told]) -> list[str]:
    return [one.text for one in told]


def orders() -> list[GenerateOrder]:
    """Short ones that grow beyond windows and slabs at different steps, and one whose prompt is long already."""
    short = [order(number, 70 + 5 * number) for number in range(5)]
    return [*short, dataclasses.replace(order(5, 40), prompt="a word and " * 250)]


@pytest.mark.parametrize("window", [16, 80])  # within the smallest slab, and amid the sizes of slabs
@pytest.mark.parametrize("kind", KINDS)
def test_answers_beyond_the_window_are_those_of_generate(kind: str, window: int, tmp_path: Path) -> None:
    desk = Desk(windowed(kind, window), tmp_path, ctx_tokens=1024, max_batch=16, batch_tokens=16384)
    assert desk.scheduler.obstacle == ""
    told = desk.together(orders())
    assert desk.steps < 110  # 90 of the longest answer, the prompts, the trial: all went together
    expected = by_transformers(desk, orders())
    assert texts(told) == expected
    assert len(set(expected)) == len(expected)


def test_one_with_layers_on_disk_answers_many_at_once_too(tmp_path: Path) -> None:
    """The first of its weights, whose device counts as the model's, is nowhere then."""
    path = windowed("gemma3-vision", 16)
    options: dict[str, Any] = {"disk": True, "max_batch": 4, "batch_tokens": 1024, "ctx_tokens": 256}
    text = "model.language_model"
    places = {f"{text}.layers.{n}": "disk" if n < 2 else "cpu" for n in range(4)}
    places |= dict.fromkeys((f"{text}.embed_tokens", f"{text}.norm", f"{text}.rotary_emb", "lm_head"), "cpu")
    places |= {"model.vision_tower": "disk", "model.multi_modal_projector": "disk"}
    desk = Desk(path, tmp_path, device_map=places, **options)
    assert set(desk.loaded.report.device_map.values()) == {"cpu", "disk"}
    assert desk.scheduler.obstacle == ""
    asked = [order(number, 30) for number in range(3)]
    told = desk.together(asked)
    assert desk.steps < 50
    assert texts(told) == by_transformers(desk, asked)


def test_eager_attention_answers_many_at_once_where_it_is_asked_for(tmp_path: Path) -> None:
    desk = Desk(tiny_llama(), tmp_path, ctx_tokens=256, max_batch=8, batch_tokens=2048, attn_implementation="eager")
    assert desk.scheduler.obstacle == ""
    asked = [order(number, 40 + 9 * number) for number in range(5)]
    told = desk.together(asked)
    assert desk.steps < 100
    assert texts(told) == by_transformers(desk, asked)


def test_a_prompts_scores_are_planned_where_attention_keeps_them() -> None:
    """Of a part of a prompt at a time, which sees all before it."""
    working = {}
    for kind in ("gemma2", "gemma3", "gpt-oss"):
        planned = plan(read_checkpoint(checkpoint(kind)), LoadOptions(), MACHINE, ctx_tokens=16_384)
        working[kind] = planned.devices[0].working_bytes
    scores = 3 * 4 * 4 * READ_AT_ONCE_EAGER * 16_384  # copies, heads, bytes
    assert working["gemma3"] < 2**28
    for kind in ("gemma2", "gpt-oss"):
        assert scores < working[kind] < scores + 2**28


@pytest.mark.parametrize("kind", ["gemma3", "gemma4", "mistral"])
def test_memory_stays_as_planned_and_who_steps_back_or_is_left_alone_loses_nothing(kind: str, tmp_path: Path) -> None:
    path = windowed(kind, 80)
    options = LoadOptions(cpu=True, max_batch=16, batch_tokens=512)
    facts = Library([path.parent]).facts(path.name)
    planned = plan(facts, options, MACHINE, ctx_tokens=384)
    desk = Desk(path, tmp_path, ctx_tokens=384, max_batch=16, batch_tokens=512)
    held: list[int] = []

    def measure(*_: object) -> None:
        slabs = desk.scheduler._slabs._slabs.values()
        held.append(sum(tensor.nbytes for slab in slabs for tensor in (*slab.keys, *slab.values)))

    desk.loaded.model.register_forward_hook(measure)
    asked = [order(number, 150 + 40 * (number == 3), temperature=0.8, seed=number) for number in range(6)]
    told = desk.together(asked)
    assert desk.steps < (6 * 150 + 40) / 1.3  # two at a time, where not more
    assert 0 < max(held) <= sum(device.kv_cache_bytes for device in planned.devices)
    assert texts(told) == texts(desk.alone(asked))


def test_more_tokens_at_once_are_more_windows_in_the_plan_too(tmp_path: Path) -> None:
    path = windowed("gemma3", 80)
    facts = Library([path.parent]).facts(path.name)
    token = 2 * 2 * 16 * 4  # keys and values, kv heads, head size, float32
    for tokens, windows in ((0, 80), (1024, 640), (400, 400)):
        options = LoadOptions(cpu=True, max_batch=8, batch_tokens=tokens)
        planned = plan(facts, options, MACHINE, ctx_tokens=512)
        assert kept_tokens(options, 512, 80) == windows
        assert sum(device.kv_cache_bytes for device in planned.devices) == 2 * token * (windows + max(512, tokens))
    assert kept_tokens(LoadOptions(), 64, 80) == 64


@settings(max_examples=200, deadline=None)
@given(st.integers(2, 200), st.lists(st.integers(1, 300), min_size=1, max_size=4), st.integers(0, 200))
def test_a_slab_gives_back_the_last_tokens_in_order(window: int, lengths: list[int], steps: int) -> None:
    """One layer with a window, one that keeps all. Each token's key is its position."""
    extents = Extents(10**6, (window, 0), (10**6, 10**6), (2, 2))
    slabs = Slabs(extents, 10**3)
    rows = []
    for length in lengths:
        row = Sequence([0] * (length + 1), read=length)
        positions = torch.arange(length, dtype=torch.float32)
        last = positions[-min(length, window - 1) :]
        row.cache = _Cache([_Layer(last), _Layer(positions)])
        slabs.add(row)
        rows.append(row)
    for row in rows:
        for _ in range(steps):
            slab = row.slab
            assert slab is not None
            if row.read >= slab.capacity:
                slabs.grow(row)
                slab = row.slab
                assert slab is not None
            for index in range(2):
                slab.keys[index][slab.rows.index(row), :, row.read % slab.size(index)] = row.read
            row.read += 1
            row.ids.append(0)
    for row in rows:
        (seen, _), (whole, _) = slabs.take_out(row)
        assert whole[0, :, 0].tolist() == list(range(row.read))
        assert seen[0, :, 0].tolist()[-(window - 1) :] == list(range(max(0, row.read - window + 1), row.read))
    assert slabs.slots == 0


@dataclasses.dataclass
class _Layer:
    """Keys and values of one sequence as a cache layer holds them: 1 × kv heads × tokens × head size."""

    positions: torch.Tensor

    def __post_init__(self) -> None:
        self.keys: torch.Tensor | None = self.positions[None, None, :, None]
        self.values: torch.Tensor | None = self.keys


@dataclasses.dataclass
class _Cache:
    layers: list[_Layer]


def test_a_cache_of_its_own_goes_on_as_if_it_had_never_been_given_up() -> None:
    from transformers import AutoConfig, DynamicCache

    config = AutoConfig.from_pretrained(windowed("mistral", 16))
    keys = torch.arange(50.0)[None, None, :, None].expand(1, 2, 50, 16)
    usual = DynamicCache(config=config)
    given = own_cache(DynamicCache(config=config), [(keys[0, :, 34:], keys[0, :, 34:])] * 4, 50)
    for layer in range(4):
        usual.update(keys, keys, layer)
    assert given.get_seq_length() == usual.get_seq_length() == 50
    assert given.get_mask_sizes(1, 0) == usual.get_mask_sizes(1, 0)
    new = torch.zeros(1, 2, 1, 16)
    for one, other in zip(given.update(new, new, 0), usual.update(new, new, 0), strict=True):
        assert torch.equal(one[:, :, -16:], other[:, :, -16:])
