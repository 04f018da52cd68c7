"""Properties of the split, on simulated devices: caps kept, all placed once, refused only where no split exists."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import replace

from hypothesis import given, settings
from hypothesis import strategies as st

from modules.devices import Gpu, Machine
from modules.options import LoadOptions
from modules.planner import Checkpoint, Plan, plan, read_checkpoint
from modules.planner.devices import Room, Rooms
from modules.planner.memory import Calibration
from modules.planner.placement import Load, place, usage
from tests import planner_checkpoints

SMALL = st.integers(0, 4)
LOADS = st.lists(
    st.builds(
        lambda weight, dearer, kv, buffers: Load(weight + buffers, weight * dearer, kv, buffers),
        st.integers(1, 12), st.sampled_from([1, 1, 1, 3]), st.integers(0, 2), st.integers(0, 1),
    ),
    min_size=1, max_size=6,
)  # fmt: skip


@st.composite
def all_rooms(draw: st.DrawFn) -> Rooms:
    count = draw(st.integers(0, 3))
    gpus = tuple(Room(str(i), draw(st.integers(1, 30)), draw(SMALL), draw(SMALL)) for i in range(count))
    ram = Room("cpu", draw(st.integers(0, 30)), 0 if gpus else draw(SMALL), draw(SMALL))
    written = draw(st.one_of(st.none(), st.integers(0, 30)))
    return Rooms(gpus, ram, bool(gpus) and draw(st.booleans()), disk=draw(st.booleans()), disk_bytes=written)


def computing(rooms: Rooms) -> list[str]:
    return [room.key for room in rooms.gpus] or [rooms.ram.key]


def keeps_caps(loads: Sequence[Load], devices: Sequence[str], rooms: Rooms) -> bool:
    """Whether no device holds more than its cap, counted block by block; what computes for others holds a block."""
    keys = computing(rooms)
    used = usage(loads, devices, keys)
    if any(key not in keys for key in devices) and used.main not in devices:
        return False
    for room in (*rooms.gpus, rooms.ram):
        held = sum(
            load.held + load.kv if room.key in keys else load.offloaded
            for load, key in zip(loads, devices, strict=True)
            if key == room.key
        )
        if room.key == used.main:
            away = [load for load, key in zip(loads, devices, strict=True) if key not in keys]
            held += sum(load.kv + load.buffers for load in away) + max((load.offloaded for load in away), default=0)
        if room.key in devices and room.key in keys:
            held += room.working_bytes + room.fixed_bytes
        elif room.key == "cpu":
            held += room.fixed_bytes
        assert room.cap_bytes is not None
        if held > room.cap_bytes:
            return False
    on_disk = sum(load.offloaded for load, key in zip(loads, devices, strict=True) if key == "disk")
    return rooms.disk_bytes is None or on_disk <= rooms.disk_bytes


def some_split_exists(loads: Sequence[Load], rooms: Rooms) -> bool:
    """By trying every one."""
    keys = computing(rooms) + ["cpu"] * rooms.spill + ["disk"] * rooms.disk
    return any(keeps_caps(loads, devices, rooms) for devices in itertools.product(keys, repeat=len(loads)))


@settings(max_examples=600, deadline=None)
@given(LOADS, all_rooms())
def test_it_fits_exactly_where_some_split_exists(loads: list[Load], rooms: Rooms) -> None:
    placed = place(loads, rooms)
    assert len(placed.devices) == len(loads)
    assert (placed.missing_bytes == 0) == some_split_exists(loads, rooms)
    if not placed.missing_bytes:
        assert keeps_caps(loads, placed.devices, rooms)


@settings(max_examples=300, deadline=None)
@given(LOADS, all_rooms())
def test_what_is_missing_would_do(loads: list[Load], rooms: Rooms) -> None:
    placed = place(loads, rooms)
    if not placed.missing_bytes:
        return
    if rooms.gpus and (rooms.ram.cap_bytes or 0) < rooms.ram.fixed_bytes:
        return  # the process itself finds no room: one number then stands for two devices

    def wider(room: Room) -> Room:
        assert room.cap_bytes is not None
        return replace(room, cap_bytes=room.cap_bytes + placed.missing_bytes * (room.key == placed.missing_on))

    wide = replace(rooms, gpus=tuple(map(wider, rooms.gpus)), ram=wider(rooms.ram))
    if placed.missing_on == "disk":
        wide = replace(wide, disk_bytes=(rooms.disk_bytes or 0) + placed.missing_bytes)
    assert not place(loads, wide).missing_bytes


GIB = 2**30
NAMES = ("llama", "llama-tied", "qwen3-moe", "gemma3", "gpt2", "t5", "bart", "deepseek-v3")
TINY = Calibration(
    gpu_fixed_bytes=20_000,
    ram_fixed_bytes=10_000,
    ram_beside_gpu_bytes=10_000,
    hidden_copies=1,
    inner_copies=0,
    tensors_in_flight=0.1,
)
CAPS = st.integers(30_000, 1_500_000)
OPTIONS = st.builds(
    lambda disk, auto, quantized, ram: LoadOptions(
        disk=disk, auto_devices=auto, load_in_4bit=quantized == 4, load_in_8bit=quantized == 8, cpu_memory=ram / GIB
    ),
    st.booleans(), st.booleans(), st.sampled_from([0, 4, 8]), st.sampled_from([0, 150_000, 600_000]),
)  # fmt: skip


def machine(caps: Sequence[int]) -> Machine:
    gpus = tuple(Gpu(i, f"simulated {i}", str(i), cap, cap) for i, cap in enumerate(caps))
    return Machine(gpus, 2_000_000, 2_000_000, GIB)


def planned(name: str, options: LoadOptions, caps: Sequence[int]) -> Plan:
    checkpoint = CHECKPOINTS.setdefault(name, read_checkpoint(planner_checkpoints.checkpoint(name)))
    return plan(checkpoint, options, machine(caps), ctx_tokens=32, calibration=TINY)


CHECKPOINTS: dict[str, Checkpoint] = {}


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), OPTIONS, st.lists(CAPS, min_size=1, max_size=4))
def test_a_plan_keeps_every_cap_and_places_all_once(name: str, options: LoadOptions, caps: list[int]) -> None:
    made = planned(name, options, caps)
    for device in made.devices:
        within = device.total_bytes <= device.cap_bytes
        assert within or (not made.fits and device.name == made.missing_on)
        assert device.weights_bytes == device.classes.total
    keys = list(made.device_map)
    assert not any(one != other and one.startswith(f"{other}.") for one in keys for other in keys if other)
    tensors = read_checkpoint(planner_checkpoints.checkpoint(name)).tensors
    covered = [key for key in keys if any(t == key or t.startswith(f"{key}.") or not key for t in tensors)]
    if keys != [""] and "language_model" not in str(keys):
        assert all(any(t == key or t.startswith(f"{key}.") for key in covered) for t in tensors)


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(["llama-tied", "gemma3", "gpt2", "t5", "bart"]), OPTIONS, st.lists(CAPS, min_size=2, max_size=4))
def test_tied_weights_lie_together(name: str, options: LoadOptions, caps: list[int]) -> None:
    places = planned(name, options, caps).device_map
    tied = {key for key in places if key.endswith(("embed_tokens", "shared", "lm_head", "wte"))}
    assert len({places[key] for key in tied}) <= 1
    assert len(tied) >= 2 or "" in places


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), OPTIONS, st.lists(CAPS, min_size=1, max_size=3), st.data())
def test_a_larger_cap_never_turns_a_fit_into_a_refusal(
    name: str, options: LoadOptions, caps: list[int], data: st.DataObject
) -> None:
    if planned(name, options, caps).fits:
        more = [cap + data.draw(st.integers(0, 300_000)) for cap in caps]
        assert planned(name, options, more).fits


@settings(max_examples=150, deadline=None)
@given(st.sampled_from(NAMES), OPTIONS, st.lists(CAPS, min_size=1, max_size=4))
def test_what_lies_beside_a_gpu_is_said_and_nothing_else_is(name: str, options: LoadOptions, caps: list[int]) -> None:
    """What the suggestions of a model that fits so, and its spare context, promise to lie on the GPUs alone does so."""

    def beside(made: Plan) -> bool:
        return made.fits and not {"cpu", "disk"}.isdisjoint(made.device_map.values())

    made = planned(name, options, caps)
    assert bool(made.offloaded) == beside(made)
    assert any("lie on a GPU" in note for note in made.notes) == beside(made)
    if not made.fits:
        return
    assert beside(made) or not made.suggestions
    for suggestion in made.suggestions:
        other = planned(name, replace(options, **suggestion.options), caps)
        assert other.fits
        assert not beside(other)
    if not beside(made):
        longer = 32 + made.spare_context_tokens
        assert not beside(plan(CHECKPOINTS[name], options, machine(caps), ctx_tokens=longer, calibration=TINY))


@given(st.sampled_from(NAMES), OPTIONS)
@settings(max_examples=40, deadline=None)
def test_without_a_gpu_what_lies_on_disk_is_said(name: str, options: LoadOptions) -> None:
    made = planned(name, options, [])
    on_disk = made.fits and "disk" in made.device_map.values()
    assert bool(made.offloaded) == any("lie in RAM" in note for note in made.notes) == on_disk
    assert not on_disk or made.offloaded.split(":")[0].endswith("on disk")
