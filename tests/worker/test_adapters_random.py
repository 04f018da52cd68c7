"""Any sequence of applying, weighting, switching, removing and refusals: always the state asked for, within bounds."""

from __future__ import annotations

import gc
import tempfile
import weakref
from collections.abc import Iterator
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from modules.errors import AdapterError
from modules.protocol import AdapterChoice
from modules.worker.adapters import adapters as module
from tests import checkpoints, loras
from tests.worker.adapted import Adapted, load

RANKS = (4, 8, 2, 4, 16)
TARGETS = (["q_proj", "down_proj"], ["q_proj", "v_proj"], ["lm_head"], ["embed_tokens", "o_proj"], ["down_proj"])
KEPT = 2  # instead of the real bound, so that few adapters are enough to exceed it
Choices = tuple[AdapterChoice, ...]


@cache
def pool() -> tuple[Path, ...]:
    """Adapters of unequal ranks and targets; the last one fits another model."""
    folder = Path(tempfile.mkdtemp())
    fitting = [
        loras.untrained(folder / f"lora{n}", checkpoints.llama(), seed=n, r=rank, target_modules=targets)
        for n, (rank, targets) in enumerate(zip(RANKS, TARGETS, strict=True))
    ]
    other = loras.untrained(folder / "other", checkpoints.gpt2(), target_modules=["c_attn"], fan_in_fan_out=True)
    return (*fitting, other)


def fresh() -> Adapted:
    return load(checkpoints.llama(), Path(tempfile.gettempdir()) / "unused", load_in_4bit=True)


def expected(choices: Choices) -> torch.Tensor:
    """What a model computes that has had this set, and no other, in its life."""
    return _expected(tuple(sorted((choice for choice in choices if choice.weight), key=lambda choice: choice.path)))


@cache
def _expected(choices: Choices) -> torch.Tensor:
    one = fresh()
    if choices:
        one.adapters.apply(choices)
    return one.logits()


CHOICES = st.lists(
    st.tuples(st.integers(0, len(RANKS) - 1), st.sampled_from([-1.0, 0.0, 1.0])),
    max_size=2,
    unique_by=lambda item: item[0],
).map(lambda items: tuple(loras.choice(pool()[n], weight) for n, weight in items))


class Sequences(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.one = fresh()
        self.one.logits()  # an answer before the first LoRA: on some CPUs it repacks the weights
        self.asked: Choices = ()
        self._seen: weakref.WeakValueDictionary[int, torch.nn.Parameter] = weakref.WeakValueDictionary()

    @rule(choices=CHOICES)
    def apply(self, choices: Choices) -> None:
        report = self.one.adapters.apply(choices)
        self.asked = choices
        assert (report.moved_nats is None) == (not choices)

    @rule(weight=st.sampled_from([-1.0, 0.0, 1.0, 0.5]))
    def change_weights(self, weight: float) -> None:
        self.apply(tuple(AdapterChoice(choice.name, choice.path, weight) for choice in self.asked))

    @rule()
    def remove(self) -> None:
        self.apply(())

    @rule(choices=CHOICES)
    def use_once(self, choices: Choices) -> None:
        with self.one.adapters.using(choices):
            assert torch.equal(self.one.logits(), expected(choices))

    @rule(choices=CHOICES, once=st.booleans())
    def refuse(self, choices: Choices, once: bool) -> None:
        unfit = (*choices, loras.choice(pool()[-1]))
        with pytest.raises(AdapterError), self.one.adapters.using(unfit) if once else nullcontext():
            self.one.adapters.apply(unfit)

    @invariant()
    def the_model_is_as_asked(self) -> None:
        assert self.one.adapters.active == self.asked
        assert torch.equal(self.one.logits(), expected(self.asked))

    @invariant()
    def memory_stays_within_its_bound(self) -> None:
        """Of everything that was ever attached, no more lives than what is bounded, what acts, and what acted last."""
        attached = self.one.adapters._attached.values()
        assert len(attached) <= KEPT + len(self.asked) + len(self.one.adapters._used)
        keys = {adapter.key for adapter in attached}
        held = {id(parameter) for name, parameter in self._adapter_parameters() if keys & set(name.split("."))}
        if not set(self._seen) <= held:
            gc.collect()
        assert set(self._seen) <= held

    def _adapter_parameters(self) -> list[tuple[str, torch.nn.Parameter]]:
        """What the layers of peft hold beside the model's own, whether they are in the model or not."""
        wrappings = self.one.adapters._wrappings.values()
        layers = [layer for wrapping in wrappings for layer in wrapping._wrappers.values()]
        found = [(name, p) for layer in layers for name, p in layer.named_parameters() if ".adapter" in f".{name}"]
        self._seen.update({id(parameter): parameter for _, parameter in found})
        return found


Sequences.TestCase.settings = settings(
    max_examples=50, stateful_step_count=8, deadline=None, suppress_health_check=list(HealthCheck)
)
TestSequences = Sequences.TestCase


@pytest.fixture(autouse=True)
def _few_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "KEPT", KEPT)


@pytest.fixture(autouse=True)
def _only_what_is_made_here_is_collected() -> Iterator[None]:
    """Hundreds of collections, each of which would go through all that other tests have left in this process."""
    gc.freeze()
    yield
    gc.unfreeze()
