"""Whether a LoRA fits a model, by the headers of both, and what it takes in the plan."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from modules.errors import AdapterError, AdapterMismatch
from modules.library import Library, ModelFacts
from modules.library.facts import read_facts
from modules.library.loras import Lora, LoraFacts, read_lora
from modules.library.scan import Model
from modules.options import LoadOptions
from modules.planner import plan
from modules.planner.lora_fit import lora_bytes, lora_fit
from tests import checkpoints, lora_files, loras
from tests.lora_files import PREFIX
from tests.services import MACHINE

HIDDEN, INNER, KEYS = 128, 256, 64  # of the small Llama
LAYER = "model.layers.1"
LLAMA = {
    f"model.layers.{layer}.{name}": shape
    for layer in "01"
    for name, shape in {
        "self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.v_proj": (KEYS, HIDDEN), "mlp.down_proj": (HIDDEN, INNER),
    }.items()
}  # fmt: skip
Make = Callable[..., LoraFacts]


@pytest.fixture
def make(tmp_path: Path) -> Make:
    """Makes LoRAs, for the small Llama if nothing else is said."""

    def made(shapes: lora_files.Shapes = LLAMA, rank: int = 4, **rest: Any) -> LoraFacts:
        name = f"lora-{len(list(tmp_path.iterdir()))}"
        return facts_of(lora_files.write(tmp_path / name, shapes, rank, **rest))

    return made


def facts_of(folder: Path) -> LoraFacts:
    return read_lora(Lora(folder.name, folder, folder.parent))


def model(path: Path, file_format: Any = "safetensors") -> ModelFacts:
    return read_facts(Model(path.name, path, path.parent, file_format))


@pytest.fixture(scope="module")
def llama() -> ModelFacts:
    return model(checkpoints.llama())


@pytest.mark.parametrize("lora", [loras.herring, loras.lantern])
def test_trained_loras_fit_what_they_were_trained_on(demo_model: Path, lora: Callable[[], Path]) -> None:
    fit = lora_fit(facts_of(lora()), Library([demo_model.parent]).facts(demo_model.name))
    assert fit.checked
    assert fit.warnings == ()


@pytest.mark.parametrize("quantized", [checkpoints.gptq, checkpoints.awq, lambda: checkpoints.bitsandbytes(4),
                                       lambda: checkpoints.bitsandbytes(8), checkpoints.sharded])  # fmt: skip
def test_shapes_are_known_of_packed_weights_too(make: Make, quantized: Callable[[], Path]) -> None:
    facts = model(quantized())
    assert lora_fit(make(), facts).checked
    for name in LLAMA:
        wrong = {**LLAMA, name: (LLAMA[name][0] + 32, LLAMA[name][1])}
        with pytest.raises(AdapterMismatch, match=name):
            lora_fit(make(wrong), facts)


def test_another_base_with_fitting_shapes_is_a_warning(make: Make, llama: ModelFacts) -> None:
    fit = lora_fit(make(base_model_name_or_path="org/Other-7B"), llama)
    assert fit.warnings == (f"lora-0 was trained on Other-7B, not on {llama.model.name}; its shapes fit.",)
    for same in (f"org/{llama.model.name.upper()}", f"C:\\models\\{llama.model.name}", "", None):
        assert lora_fit(make(base_model_name_or_path=same), llama).warnings == ()


@pytest.mark.parametrize("name", LLAMA)
@pytest.mark.parametrize("change", [(0, 32), (32, 0)])
def test_one_tensor_of_another_shape_is_refused(
    make: Make, llama: ModelFacts, name: str, change: tuple[int, int]
) -> None:
    outputs, inputs = LLAMA[name][0] + change[0], LLAMA[name][1] + change[1]
    with pytest.raises(AdapterMismatch) as caught:
        lora_fit(make({**LLAMA, name: (outputs, inputs)}), llama)
    assert f"{name} is {outputs} × {inputs} for it, and {LLAMA[name][0]} × {LLAMA[name][1]} in the model" in str(
        caught.value
    )


def test_a_lora_of_another_architecture_is_refused_with_its_base(make: Make, llama: ModelFacts) -> None:
    gpt2 = make({"transformer.h.*.attn.c_attn": (384, 128)}, base_model_name_or_path="org/gpt2")
    with pytest.raises(
        AdapterMismatch, match=r"transformer\.h\.0\.attn\.c_attn, which the model does not have"
    ) as caught:
        lora_fit(gpt2, llama)
    assert "Load gpt2" in caught.value.hint
    assert lora_fit(gpt2, model(checkpoints.gpt2())).checked  # whose weights lie the other way round
    with pytest.raises(AdapterMismatch, match=r"model\.layers"):
        lora_fit(make(), model(checkpoints.gpt2()))


def test_targets_and_tensors_are_the_same_modules(make: Make, llama: ModelFacts) -> None:
    """What is not among the targets would be left out without a word."""
    with pytest.raises(AdapterMismatch, match="none of its target modules"):
        lora_fit(make(target_modules=["no_such_proj"]), llama)
    with pytest.raises(AdapterMismatch, match=r"down_proj, which is none"):
        lora_fit(make(target_modules=["q_proj", "v_proj"]), llama)
    more = lora_fit(make(target_modules=["q_proj", "v_proj", "down_proj", "w9"]), llama)
    assert more.warnings == ("lora-2 lists w9, of which neither it nor the model has any.",)
    assert lora_fit(make(target_modules=r"(a+)+\..*proj"), llama).checked  # a pattern is not run


def test_a_module_without_its_matrices_is_refused_unless_its_layer_is_left_out(make: Make, llama: ModelFacts) -> None:
    part = {name: shape for name, shape in LLAMA.items() if name.startswith(LAYER)}
    with pytest.raises(AdapterMismatch, match=r"targets model\.layers\.0\..* and holds no matrices for it, nor for 2"):
        lora_fit(make(part), llama)
    assert lora_fit(make(part, layers_to_transform=[1]), llama).checked


def test_ranks_that_disagree_are_refused(make: Make, llama: ModelFacts) -> None:
    with pytest.raises(AdapterMismatch, match=r"its rank is 8, and its matrices for .* have 4"):
        lora_fit(make(r=8), llama)
    name = next(iter(LLAMA))
    tensors = {f"{PREFIX}{name}.lora_B.weight": np.zeros((HIDDEN, 3), np.float32)}
    with pytest.raises(AdapterMismatch, match="do not belong together"):
        lora_fit(make(tensors=tensors), llama)


def test_a_vocabulary_of_another_size_is_named(make: Make, llama: ModelFacts) -> None:
    for size, fits in ((checkpoints.VOCABULARY, True), (checkpoints.VOCABULARY + 8, False)):
        tensors = {f"{PREFIX}lm_head.weight": np.zeros((size, HIDDEN), np.float32)}
        lora = make(tensors=tensors, modules_to_save=["lm_head"])
        if fits:
            assert lora_fit(lora, llama).checked
        else:
            with pytest.raises(AdapterMismatch, match="its vocabulary has 608 tokens, the model's 600"):
                lora_fit(lora, llama)
    with pytest.raises(AdapterMismatch, match="classifier"):
        lora_fit(make(tensors={f"{PREFIX}classifier.weight": np.zeros((2, HIDDEN), np.float32)}), llama)


def test_embeddings_and_tied_heads_can_be_changed(make: Make, demo_model: Path) -> None:
    facts = model(demo_model)
    rows, columns = facts.tensors["model.embed_tokens.weight"].shape
    embedding = {
        f"{PREFIX}model.embed_tokens.lora_embedding_A": np.ones((4, rows), np.float32),
        f"{PREFIX}model.embed_tokens.lora_embedding_B": np.ones((columns, 4), np.float32),
    }
    lora = make({"lm_head": (rows, columns)}, tensors=embedding, target_modules=["lm_head", "embed_tokens"])
    assert lora_fit(lora, facts).checked
    embedding[f"{PREFIX}model.embed_tokens.lora_embedding_A"] = np.ones((4, rows + 1), np.float32)
    with pytest.raises(AdapterMismatch, match="embed_tokens"):
        lora_fit(
            make({"lm_head": (rows, columns)}, tensors=embedding, target_modules=["lm_head", "embed_tokens"]), facts
        )


@pytest.mark.parametrize(
    "config", [{"bias": "all"}, {"init_lora_weights": "pissa"}, {"layer_replication": [[0, 2]]}], ids=str
)
def test_what_could_not_be_taken_back_fits_no_model(make: Make, llama: ModelFacts, config: dict[str, Any]) -> None:
    with pytest.raises(AdapterError, match="could not be taken back"):
        lora_fit(make(**config), llama)


def test_other_kinds_and_foreign_tensors_are_refused(make: Make, llama: ModelFacts) -> None:
    with pytest.raises(AdapterError, match="'IA3'"):
        lora_fit(make(peft_type="IA3"), llama)
    with pytest.raises(AdapterError, match="holds a tensor that no LoRA has: something"):
        lora_fit(make(tensors={"something": np.zeros(3, np.float32)}), llama)


def test_where_headers_do_not_tell_loading_will(make: Make) -> None:
    assert not lora_fit(make(), model(checkpoints.pytorch(), "pytorch")).checked
    assert not lora_fit(make(), model(checkpoints.custom_code())).checked
    assert not lora_fit(make(), model(checkpoints.gguf_file(), "gguf")).checked


def test_the_plan_counts_them_where_they_lie(make: Make, llama: ModelFacts) -> None:
    lora = make()
    elements = sum(4 * (outputs + inputs) for outputs, inputs in LLAMA.values())
    parts = lora_bytes(lora)
    assert sum(parts.values()) == 4 * elements  # as float32
    assert parts[f"{LAYER}.self_attn.v_proj"] == 4 * 4 * (KEYS + HIDDEN)
    adapters = (*parts.items(), *lora_bytes(make({"somewhere.else": (8, 8)})).items())
    for options in (LoadOptions(), LoadOptions(load_in_4bit=True)):
        without = plan(llama, options, MACHINE, ctx_tokens=128)
        with_them = plan(llama, options, MACHINE, ctx_tokens=128, adapters=adapters)
        assert with_them.weights_bytes - without.weights_bytes == 4 * (elements + 4 * 16)
        assert with_them.devices[0].classes.adapters == 4 * (elements + 4 * 16)
        assert without.devices[0].classes.adapters == 0


def test_a_lora_can_be_what_does_not_fit(make: Make, llama: ModelFacts) -> None:
    small = LoadOptions(cpu_memory=0.005)
    assert plan(llama, small, MACHINE, ctx_tokens=128).fits
    huge = (("model.layers.0.mlp.up_proj", 2**30),)
    assert not plan(llama, small, MACHINE, ctx_tokens=128, adapters=huge).fits
