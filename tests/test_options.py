"""The one table: every row parses its own default, keeps its bounds, and is a flag, a setting and a field."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import OptionConflict, OptionError
from modules.options import (
    COMMAND_OPTIONS,
    GENERATION_OPTIONS,
    GROUPS,
    LOAD_OPTIONS,
    PRECISIONS,
    SERVER_OPTIONS,
    Circumstances,
    CommandOptions,
    GenerationOptions,
    LoadOptions,
    ServerOptions,
    Spec,
    adapter_text,
    alpha_for,
    changed,
    check,
    context_tokens,
    find,
    parse_values,
    split_adapter,
    stretched_context,
)
from modules.options.loader import EXCLUSIVE
from modules.options.server import GROUPS as SERVER_GROUPS
from modules.settings import FILE_OPTIONS

TABLES = (
    (LoadOptions, LOAD_OPTIONS),
    (GenerationOptions, GENERATION_OPTIONS),
    (ServerOptions, SERVER_OPTIONS),
    (CommandOptions, COMMAND_OPTIONS),
)
SPECS = [spec for _, table in TABLES for spec in table.values()]
BOUNDED = [spec for spec in SPECS if spec.low is not None or spec.high is not None]
every_option = pytest.mark.parametrize("spec", SPECS, ids=lambda spec: spec.name)
ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6) | st.just(10**400),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=2), inner, max_size=2),
    max_leaves=5,
)
TWO_GPUS = Circumstances(gpu_names=("A GPU", "Another"))
# What turns each option on, for the checks of several options together.
ON: dict[str, Any] = {
    "load_in_4bit": True, "load_in_8bit": True, "alpha_value": 2.5, "compress_pos_emb": 2.0, "rope_freq_base": 1e6,
    "cpu": True, "gpu_memory": (10.0,),
}  # fmt: skip


class TestTable:
    @every_option
    def test_a_default_is_a_value(self, spec: Spec) -> None:
        parsed = spec.parse(spec.default)
        assert parsed == spec.default
        assert type(parsed) is type(spec.default)

    @every_option
    def test_a_row_tells_a_person_enough(self, spec: Spec) -> None:
        assert spec.label
        assert spec.help.endswith((".", "?"))
        assert spec.takes
        assert spec.group in {**GROUPS, "generation": "", **SERVER_GROUPS}
        assert spec.kind != "choice" or spec.default in spec.choices
        assert not spec.strict or spec.applies(Circumstances(model_chosen=True, quantization="gptq", has_rope=False))

    @every_option
    def test_every_row_is_a_setting_unless_it_says_what_to_do(self, spec: Spec) -> None:
        only_flags = {"model", "home", "settings", *COMMAND_OPTIONS}
        assert (spec.name in FILE_OPTIONS) == (spec.name not in only_flags)

    @pytest.mark.parametrize(("cls", "table"), TABLES)
    def test_the_fields_are_the_rows(self, cls: type, table: dict[str, Spec]) -> None:
        fields = {field.name: field.default for field in dataclasses.fields(cls)}
        assert fields == {name: spec.default for name, spec in table.items()}
        assert dataclasses.asdict(cls()) == fields

    def test_precisions_are_options(self) -> None:
        for state, values in PRECISIONS.items():
            assert set(values) <= set(LOAD_OPTIONS), state
            given_values: dict[str, Any] = {**values}
            check(LoadOptions(**given_values), Circumstances())


class TestParse:
    @every_option
    @given(value=ANYTHING)
    def test_anything_is_parsed_once_for_all_or_refused(self, spec: Spec, value: Any) -> None:
        try:
            parsed = spec.parse(value)
        except OptionError as error:
            refused = error.message
            assert spec.flag in refused
        else:
            assert spec.parse(parsed) == parsed
            assert isinstance(parsed, type(spec.default))

    @pytest.mark.parametrize(
        "spec", [s for s in SPECS if s.low is not None or s.high is not None], ids=lambda s: s.name
    )
    def test_bounds_hold(self, spec: Spec) -> None:
        several = spec.kind == "numbers"
        step = 1 if spec.kind == "integer" else 1e-6

        def parse(number: float) -> Any:
            return spec.parse([number] if several else number)

        for bound, outwards in ((spec.low, -step), (spec.high, step)):
            if bound is None:
                continue
            if outwards < 0 and spec.above_low:
                assert parse(bound + 1e-6)
                outwards = 0
            else:
                parse(bound)
            with pytest.raises(OptionError, match=spec.flag):
                parse(int(bound) + outwards if spec.kind == "integer" else bound + outwards)

    @pytest.mark.parametrize("spec", [s for s in SPECS if s.kind in ("number", "integer")], ids=lambda s: s.name)
    @pytest.mark.parametrize(
        "value", [math.nan, math.inf, -math.inf, pytest.param(10**400, id="10**400"), "nan", "", True]
    )
    def test_what_is_no_number(self, spec: Spec, value: Any) -> None:
        with pytest.raises(OptionError, match=spec.flag):
            spec.parse(value)

    @pytest.mark.parametrize(
        ("name", "value", "parsed"),
        [
            ("gpu_memory", "10 6", (10.0, 6.0)),
            ("gpu_memory", "10GiB,6144MiB", (10.0, 6.0)),
            ("gpu_memory", [10, "6"], (10.0, 6.0)),
            ("gpu_memory", 10, (10.0,)),
            ("gpu_memory", None, ()),
            ("gpu_memory", "", ()),
            ("cpu_memory", "24GiB", 24.0),
            ("cpu_memory", "512MiB", 0.5),
            ("ctx_size", 4096.0, 4096),
            ("ctx_size", "4096", 4096),
            ("alpha_value", 2, 2.0),
        ],
    )
    def test_values_as_people_write_them(self, name: str, value: Any, parsed: Any) -> None:
        assert LOAD_OPTIONS[name].parse(value) == parsed

    @pytest.mark.parametrize("word", ["transformers", "TRANSFORMERS", "Transformers"])
    def test_a_choice_counts_whatever_its_letters_case(self, word: str) -> None:
        assert LOAD_OPTIONS["loader"].parse(word) == "Transformers"

    def test_a_wrong_choice_names_the_nearest(self) -> None:
        with pytest.raises(OptionError, match="--quant_type does not know 'nf5'") as error:
            LOAD_OPTIONS["quant_type"].parse("nf5")
        assert error.value.hint == "Did you mean nf4?"

    @pytest.mark.parametrize("name", ["load_in_4bit", "load-in-4bit", "--load-in-4bit", " load_in_4bit "])
    def test_either_spelling_finds_an_option(self, name: str) -> None:
        assert find(LOAD_OPTIONS, name).name == "load_in_4bit"

    def test_several_values_at_once(self) -> None:
        assert parse_values(LOAD_OPTIONS, {"ctx-size": "1", "bf16": True}) == {"ctx_size": 1, "bf16": True}
        with pytest.raises(OptionError, match="no option 'bf61'") as error:
            parse_values(LOAD_OPTIONS, {"bf61": True})
        assert "bf16" in error.value.hint
        with pytest.raises(OptionError, match="ctx_size is given twice"):
            parse_values(LOAD_OPTIONS, {"ctx-size": 1, "ctx_size": 2})


class TestCheck:
    def test_nothing_set_says_nothing(self) -> None:
        assert check(LoadOptions(), Circumstances()) == ()
        assert changed(LoadOptions()) == {}

    @pytest.mark.parametrize(("one", "other", "why"), EXCLUSIVE)
    def test_options_that_exclude_each_other(self, one: str, other: str, why: str) -> None:
        options = LoadOptions(**{one: ON[one], other: ON[other]})
        assert set(changed(options)) == {one, other}
        with pytest.raises(OptionConflict) as error:
            check(options, TWO_GPUS)
        for text in (LOAD_OPTIONS[one].flag, LOAD_OPTIONS[other].flag, why):
            assert text in error.value.message
        check(dataclasses.replace(options, **error.value.fix), TWO_GPUS)  # the button's values mend it

    @pytest.mark.parametrize(
        ("values", "circumstances", "reason"),
        [
            ({"load_in_4bit": True}, Circumstances(quantization="gptq"), "already quantized (gptq)"),
            ({"load_in_8bit": True}, Circumstances(quantization="gguf"), "already quantized (gguf)"),
            ({"alpha_value": 2.5}, Circumstances(has_rope=False), "no rotary"),
            ({"rope_freq_base": 1e6}, Circumstances(has_rope=False), "no rotary"),
            ({"compress_pos_emb": 2.0}, Circumstances(has_rope=False), "no rotary"),
            ({"compress_pos_emb": 2.0}, Circumstances(rope_scaling="llama3"), "of its own (llama3)"),
            ({"gpu_memory": (10.0,)}, Circumstances(), "no GPU"),
        ],
    )
    def test_what_cannot_be_followed_is_refused_with_the_reason(
        self, values: dict[str, Any], circumstances: Circumstances, reason: str
    ) -> None:
        with pytest.raises(OptionConflict) as error:
            check(LoadOptions(**values), circumstances)
        assert reason in error.value.message
        check(LoadOptions(**{**values, **error.value.fix}), circumstances)

    @pytest.mark.parametrize(
        ("values", "circumstances", "note"),
        [
            ({"bf16": True}, Circumstances(quantization="awq"), "--bf16 has no effect here. The checkpoint is already"),
            ({"quant_type": "fp4"}, Circumstances(), "--quant_type has no effect here. Only with load-in-4bit."),
            ({"disable_exllama": True}, Circumstances(model_chosen=True), "not a GPTQ checkpoint"),
            ({"use_fast": False}, Circumstances(model_chosen=True), "only the fast form of its tokenizer"),
            (
                {"use_fast": False},
                Circumstances(model_chosen=True, has_fast_tokenizer=False, has_slow_tokenizer=True),
                "SentencePiece file is used as it is",
            ),
            ({"load_in_4bit": True, "disk": True}, Circumstances(), "--disk has no effect here. Layers that are quant"),
            ({"disk": True}, Circumstances(quantization="bitsandbytes"), "--disk has no effect here. Layers of a bits"),
            (
                {"disk": True},
                Circumstances(quantization="gguf"),
                "--disk has no effect here. Layers of a gguf checkpoi",
            ),
            (
                {"cpu_memory": 4.0},
                dataclasses.replace(TWO_GPUS, quantization="bitsandbytes"),
                "--cpu-memory has no effect here.",
            ),
            ({"trust_remote_code": True}, Circumstances(model_chosen=True), "brings no Python code"),
            ({"ctx_size": 9000}, Circumstances(context_tokens=8192), "9,000 tokens is beyond the model's 8,192"),
        ],
    )
    def test_what_has_no_effect_is_said(self, values: dict[str, Any], circumstances: Circumstances, note: str) -> None:
        options = LoadOptions(**values)
        with_values = dataclasses.replace(circumstances, values=dataclasses.asdict(options))
        assert any(note in said for said in check(options, with_values))

    @pytest.mark.parametrize(
        ("values", "circumstances"),
        [
            ({"load_in_4bit": True, "cpu_memory": 4.0}, Circumstances()),
            ({"load_in_4bit": True, "disk": True, "cpu_memory": 4.0}, TWO_GPUS),
            ({"cpu_memory": 4.0}, Circumstances(quantization="bitsandbytes")),
            ({"use_fast": False}, Circumstances(model_chosen=True, has_slow_tokenizer=True)),
            ({"ctx_size": 9000, "rope_freq_base": 1e6}, Circumstances(context_tokens=8192)),
        ],
    )
    def test_what_has_its_effect_is_not_remarked_on(self, values: dict[str, Any], circumstances: Circumstances) -> None:
        options = LoadOptions(**values)
        assert check(options, dataclasses.replace(circumstances, values=dataclasses.asdict(options))) == ()

    @pytest.mark.parametrize(
        ("values", "has_rope", "advised"),
        [
            ({}, True, True),
            ({}, False, False),
            ({"alpha_value": 1.2}, True, True),
            ({"compress_pos_emb": 2.0}, True, False),
        ],
    )
    def test_alpha_value_is_advised_where_it_can_be_had(
        self, values: dict[str, Any], has_rope: bool, advised: bool
    ) -> None:
        [note] = check(LoadOptions(ctx_size=90_000, **values), Circumstances(context_tokens=8192, has_rope=has_rope))
        assert "is beyond the model's" in note
        assert ("alpha_value" in note) == advised

    def test_gpu_memory_counts_the_gpus(self) -> None:
        check(LoadOptions(gpu_memory=(10.0, 6.0)), TWO_GPUS)
        check(LoadOptions(gpu_memory=(0.0, 6.0)), TWO_GPUS)
        with pytest.raises(OptionError, match="names 3 GPUs; this machine has 2: A GPU, Another"):
            check(LoadOptions(gpu_memory=(1.0, 1.0, 1.0)), TWO_GPUS)
        with pytest.raises(OptionError, match="leaves every GPU out"):
            check(LoadOptions(gpu_memory=(0.0, 0.0)), TWO_GPUS)


class TestContext:
    @given(ratio=st.floats(1, 2))
    def test_alpha_for_is_the_inverse_of_stretching(self, ratio: float) -> None:
        limit = 1_000_000
        stretched = stretched_context(LoadOptions(alpha_value=alpha_for(ratio)), limit)
        assert stretched == pytest.approx(ratio * limit, rel=0.007)  # alpha has two decimals, and is rounded up

    @given(limit=st.integers(512, 200_000), share=st.floats(1, 4))
    def test_with_alpha_for_a_context_is_not_beyond_the_limit(self, limit: int, share: float) -> None:
        context = int(limit * share)
        assert stretched_context(LoadOptions(alpha_value=alpha_for(context / limit)), limit) >= context

    @given(alpha=st.floats(1, 2.5))
    def test_and_the_other_way_round(self, alpha: float) -> None:
        ratio = stretched_context(LoadOptions(alpha_value=alpha), 1_000_000) / 1_000_000
        assert alpha_for(ratio) == pytest.approx(alpha, abs=0.011)

    @pytest.mark.parametrize(
        ("values", "tokens"),
        [
            ({}, 8192),
            ({"alpha_value": 1.75}, 12288),
            ({"alpha_value": 2.5}, 16384),
            ({"compress_pos_emb": 4.0}, 32768),
            ({"rope_freq_base": 1e6}, 8192),
        ],
    )
    def test_the_documented_points(self, values: dict[str, Any], tokens: int) -> None:
        assert stretched_context(LoadOptions(**values), 8192) == tokens

    @given(alphas=st.tuples(st.floats(1, 10), st.floats(1, 10)))
    def test_more_alpha_never_gives_less(self, alphas: tuple[float, float]) -> None:
        less, more = (stretched_context(LoadOptions(alpha_value=alpha), 8192) for alpha in sorted(alphas))
        assert less <= more

    @pytest.mark.parametrize(
        ("values", "limit", "tokens"),
        [
            ({}, 131072, 8192),
            ({}, 2048, 2048),
            ({}, 0, 8192),
            ({"ctx_size": 100}, 2048, 100),
            ({"alpha_value": 2.5}, 2048, 4096),
        ],
    )
    def test_the_context_of_a_load(self, values: dict[str, Any], limit: int, tokens: int) -> None:
        assert context_tokens(LoadOptions(**values), limit) == tokens


def test_loras_are_names_with_weights() -> None:
    spec = LOAD_OPTIONS["lora"]
    assert spec.parse(["pirate", "cheese:0.50", " org/with space : -2"]) == (
        "pirate",
        "cheese:0.5",
        "org/with space :-2",
    )
    assert spec.parse('["with space:0.25"]') == ("with space:0.25",)
    assert spec.parse("a, b:0.5") == ("a", "b:0.5")
    assert spec.parse(["a:1.0", "odd:name", "odd:1:1"]) == ("a", "odd:name", "odd:1:1")
    for wrong in (["a:2.5"], ["a", "a:0.5"], [""], [":1"], [3], "[", {"a": 1}, True):
        with pytest.raises(OptionError, match="NAME:WEIGHT"):
            spec.parse(wrong)


@given(st.text(min_size=1).filter(lambda text: text == text.strip()), st.floats(-2, 2))
def test_a_lora_and_its_weight_are_split_as_they_were_joined(name: str, weight: float) -> None:
    weight = float(f"{weight:g}")
    assert split_adapter(adapter_text(name, weight)) == (name, weight)
