"""Layers of explicitly set values, the files they come from, and the yes to custom code."""

from __future__ import annotations

import errno
import os
import re
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from modules.errors import CustomCodeRefused, DiskFull, OptionConflict, OptionError, SettingsError
from modules.library import CodeFile
from modules.options import GENERATION_OPTIONS, LOAD_OPTIONS, PRECISIONS, SERVER_OPTIONS, Circumstances, check
from modules.settings import (
    FILE_OPTIONS,
    CodeApprovals,
    Settings,
    contradicting,
    read_values,
    resolve,
    write_whole,
)
from tests import settings_example

NAME = "SmolLM2-135M-Instruct"
Layers = Sequence[tuple[str, dict[str, Any]]]


def named(**layers: dict[str, Any]) -> Layers:
    """Layers by their names; ``settings_yaml`` stands for settings.yaml."""
    return [(name.replace("_yaml", ".yaml"), values) for name, values in layers.items()]


class TestLayers:
    def test_nothing_set_is_the_table(self) -> None:
        resolved = resolve([])
        assert {name: getattr(resolved.options, name) for name in LOAD_OPTIONS} == {
            name: spec.default for name, spec in LOAD_OPTIONS.items()
        }
        assert set(resolved.origin.values()) == {"default"}

    def test_the_higher_layer_counts_and_is_named(self) -> None:
        resolved = resolve(
            named(settings_yaml={"ctx_size": 1, "bf16": True}, saved={"ctx_size": 2}, flag={"ctx_size": 3}, form={})
        )
        assert (resolved.options.ctx_size, resolved.origin["ctx_size"]) == (3, "flag")
        assert (resolved.options.bf16, resolved.origin["bf16"]) == (True, "settings.yaml")
        assert resolved.origin["cpu"] == "default"

    def test_a_default_set_explicitly_counts(self) -> None:
        resolved = resolve(named(saved={"load_in_4bit": True, "alpha_value": 2.5}, form={"load_in_4bit": False}))
        assert (resolved.options.load_in_4bit, resolved.origin["load_in_4bit"]) == (False, "form")
        assert resolved.options.alpha_value == 2.5

    def test_values_are_parsed(self) -> None:
        options = resolve(named(form={"gpu-memory": "10GiB, 6", "ctx_size": 4096.0})).options
        assert (options.gpu_memory, options.ctx_size) == ((10.0, 6.0), 4096)

    def test_mistakes_name_the_option(self) -> None:
        with pytest.raises(OptionError, match="no option 'load_in_4bits'") as error:
            resolve(named(form={"load_in_4bits": True}))
        assert "load_in_4bit" in error.value.hint
        with pytest.raises(OptionError, match="--ctx-size"):
            resolve(named(form={"ctx_size": "many"}))

    @pytest.mark.parametrize(
        ("lower", "upper"),
        [
            ({"load_in_8bit": True}, {"load_in_4bit": True}),
            ({"load_in_4bit": True}, {"load_in_8bit": True}),
            ({"bf16": True}, {"load_in_4bit": True}),
            ({"load_in_4bit": True}, {"bf16": True}),
            ({"alpha_value": 2.5}, {"compress_pos_emb": 2.0}),
            ({"rope_freq_base": 1e6, "compress_pos_emb": 2.0}, {"alpha_value": 2.5}),
            ({"cpu": True}, {"gpu_memory": (10.0,)}),
            ({"gpu_memory": (10.0,)}, {"cpu": True}),
        ],
    )
    def test_what_a_higher_layer_turns_on_replaces_the_alternative(
        self, lower: dict[str, Any], upper: dict[str, Any]
    ) -> None:
        resolved = resolve(named(saved=lower, form=upper))
        check(resolved.options, Circumstances(gpu_names=("A GPU",)))
        for name, value in upper.items():
            assert getattr(resolved.options, name) == value
        for name in lower:
            assert getattr(resolved.options, name) == LOAD_OPTIONS[name].default
            assert resolved.origin[name] == "default"

    @pytest.mark.parametrize("one", [name for name in PRECISIONS if PRECISIONS[name]])
    @pytest.mark.parametrize("other", [name for name in PRECISIONS if PRECISIONS[name]])
    def test_the_control_of_precision_is_one_choice_in_every_layer(self, one: str, other: str) -> None:
        options = resolve(named(saved=dict(PRECISIONS[one]), flag=dict(PRECISIONS[other]))).options
        on = {name for state in PRECISIONS.values() for name in state if getattr(options, name)}
        assert on == set(PRECISIONS[other])

    def test_turning_something_off_does_not_touch_the_alternative(self) -> None:
        options = resolve(named(saved={"load_in_8bit": True}, form={"load_in_4bit": False})).options
        assert options.load_in_8bit

    def test_both_in_one_layer_stay_a_contradiction(self) -> None:
        resolved = resolve(named(flag={"load_in_4bit": True, "load_in_8bit": True}))
        with pytest.raises(OptionConflict, match=r"--load-in-4bit and --load-in-8bit exclude each other"):
            check(resolved.options, Circumstances())


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"alpha_value": 2.5, "rope_freq_base": 1e6, "ctx_size": 1}, {"alpha_value", "rope_freq_base"}),
        ({"load_in_4bit": True, "bf16": True}, {"load_in_4bit", "bf16"}),
        ({"load_in_4bit": True, "load_in_8bit": False, "alpha_value": 2.5, "rope_freq_base": 0.0}, set()),
    ],
)
def test_values_that_are_given_beside_an_alternative_of_theirs(given: dict[str, Any], names: set[str]) -> None:
    assert contradicting(given) == names


class TestSettingsFile:
    def read(self, tmp_path: Path, text: str) -> Settings:
        file = tmp_path / "settings.yaml"
        file.write_text(text, encoding="utf-8")
        return Settings(file, tmp_path / "models")

    def test_every_kind_of_option(self, tmp_path: Path) -> None:
        found = self.read(
            tmp_path, "load-in-4bit: yes\nctx_size: 2048\ntop_k: 3\nlisten_port: 0\nmodel_dir: [/a, /b]\n"
        )
        assert found.load_values == {"load_in_4bit": True, "ctx_size": 2048}
        assert found.generation_values == {"top_k": 3}
        assert found.server_values == {"listen_port": 0, "model_dir": ("/a", "/b")}

    @pytest.mark.parametrize("text", ["", "# nothing\n", "{}\n"])
    def test_an_empty_file(self, tmp_path: Path, text: str) -> None:
        assert self.read(tmp_path, text).load_values == {}

    def test_no_file(self, tmp_path: Path) -> None:
        assert Settings(tmp_path / "settings.yaml", tmp_path).load_values == {}

    @pytest.mark.parametrize(
        ("text", "message", "hint"),
        [
            ("bf16: true\n\nload_in_4bits: true\n", "line 3: There is no option 'load_in_4bits'", "load_in_4bit"),
            ("ctx_size: large\n", "line 1: --ctx-size takes a whole number", ""),
            ("# x\nbf16: 1\n", "line 2: --bf16 takes on or off, not 1", ""),
            ("quant_type: nf5\n", "line 1: --quant_type does not know 'nf5'", "nf4"),
            ("gpu_memory: [10, much]\n", "line 1: --gpu-memory takes numbers", ""),
            ("bf16: true\nmodel: x\n", "line 2: model can only be given on the command line", "Remove"),
            ("prompt: x\n", "line 1: There is no option 'prompt'", ""),
            ("bf16: true\nload-in-4bit: true\nload_in_4bit: true\n", "line 3: load_in_4bit is set twice", "Remove"),
            ("1: true\n", "There is no option '1'", ""),
            ("bf16: [\n", "is not YAML", ""),
            ("a: 2020-13-45\n", "is not YAML", ""),
            ("- bf16\n", "must hold lines of the form", ""),
            ("bf16\n", "must hold lines of the form", ""),
            ("? [a]\n: 1\n", "is not YAML", ""),
            ("a: " + "[" * 5000, "is not YAML", ""),
        ],
    )
    def test_mistakes_name_the_file_and_the_line(self, tmp_path: Path, text: str, message: str, hint: str) -> None:
        with pytest.raises(SettingsError, match=r"^settings\.yaml") as error:
            self.read(tmp_path, text)
        assert message in error.value.message
        assert hint in error.value.hint
        assert error.value.hint

    @pytest.mark.parametrize("name", ["model_dir", "lora_dir", "gradio_auth", "guest_auth"])
    def test_a_text_is_one_folder_or_login_and_a_list_gives_several(self, tmp_path: Path, name: str) -> None:
        assert self.read(tmp_path, f'{name}: "ann:my models, all"').server_values == {name: ("ann:my models, all",)}
        assert self.read(tmp_path, f'{name}: ["/my models", /b]').server_values == {name: ("/my models", "/b")}
        assert self.read(tmp_path, f'{name}: ""').server_values == {name: ()}

    def test_a_text_may_name_several_hosts(self, tmp_path: Path) -> None:
        assert self.read(tmp_path, "allowed_host: one.org two.org").server_values == {
            "allowed_host": ("one.org", "two.org")
        }

    def test_a_file_that_is_not_text(self, tmp_path: Path) -> None:
        (tmp_path / "settings.yaml").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(SettingsError, match=r"settings\.yaml cannot be read"):
            Settings(tmp_path / "settings.yaml", tmp_path)

    @given(
        text=st.text(max_size=60) | st.lists(st.sampled_from([*"[]{}:,-&*!|>%@`'\"\n #?", "a", "bf16"])).map("".join)
    )
    @settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    def test_any_text(self, tmp_path: Path, text: str) -> None:
        with suppress(SettingsError):  # and nothing else
            self.read(tmp_path, text)

    def test_the_one_in_the_project_names_every_option_and_sets_none(self) -> None:
        text = settings_example.SETTINGS.read_text(encoding="utf-8")
        assert text == settings_example.example()
        named_there = re.findall(r"^#?(\w+):", text, re.MULTILINE)
        assert sorted(named_there) == sorted(FILE_OPTIONS)
        assert {**LOAD_OPTIONS, **GENERATION_OPTIONS, **SERVER_OPTIONS}.keys() - FILE_OPTIONS.keys() == {
            "model", "home", "settings",
        }  # fmt: skip
        read_values(settings_example.SETTINGS, FILE_OPTIONS)

    def test_the_example_is_valid_when_every_line_is_in_force(self, tmp_path: Path) -> None:
        assert yaml.safe_load(settings_example.example()) is None
        in_force = re.sub(r"^#(\w+:)", r"\1", settings_example.example(), flags=re.MULTILINE)
        (tmp_path / "settings.yaml").write_text(in_force, encoding="utf-8")
        assert read_values(tmp_path / "settings.yaml", FILE_OPTIONS) == {
            name: spec.default for name, spec in FILE_OPTIONS.items()
        }


class TestSaved:
    @pytest.fixture
    def store(self, tmp_path: Path) -> Settings:
        return Settings(tmp_path / "settings.yaml", tmp_path / "models")

    def test_what_is_saved_comes_back(self, store: Settings) -> None:
        values = {"load_in_4bit": True, "gpu_memory": (10.0, 6.5), "alpha_value": 2.5, "use_fast": False, "cpu": False}
        path = store.save("org/name", values)
        assert path.name == "org--name.yaml"
        assert store.saved("org/name") == (values, "")
        assert store.saved("other") == ({}, "")
        assert "load_in_4bit: true" in path.read_text(encoding="utf-8")  # for people to read

    def test_nothing_to_keep(self, store: Settings) -> None:
        store.save(NAME, {"bf16": True})
        store.save(NAME, {})
        assert store.saved(NAME) == ({}, "")

    def test_forget(self, store: Settings) -> None:
        path = store.save(NAME, {"bf16": True})
        store.forget(NAME)
        assert not path.exists()
        assert store.saved(NAME) == ({}, "")
        store.forget(NAME)

    @pytest.mark.parametrize("text", ["bf16: [", "ctx_size: large\n", "nonsense: 1\n", "\x00"])
    def test_a_broken_file_is_named_kept_and_ignored(self, store: Settings, text: str) -> None:
        path = store.save(NAME, {"bf16": True})
        path.write_text(text, encoding="utf-8")
        values, warning = store.saved(NAME)
        assert values == {}
        assert path.name in warning
        assert path.read_text(encoding="utf-8") == text

    @pytest.mark.parametrize("name", ["../x", "..", "/etc/x", "a/../../x", "..\\x", ".hidden"])
    def test_no_name_leaves_the_folder(self, store: Settings, name: str) -> None:
        path = store.save(name, {"bf16": True})
        assert path.parent == store.saved_dir
        assert list(store.saved_dir.iterdir()) == [path]

    def test_a_mistake_is_not_written(self, store: Settings) -> None:
        path = store.save(NAME, {"bf16": True})
        before = path.read_bytes()
        with pytest.raises(OptionError):
            store.save(NAME, {"ctx_size": -1})
        assert path.read_bytes() == before

    def test_a_full_disk_leaves_the_old_file_whole(self, store: Settings, monkeypatch: pytest.MonkeyPatch) -> None:
        path = store.save(NAME, {"bf16": True})

        def full(_: int) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(os, "fsync", full)
        with pytest.raises(DiskFull, match=path.name):
            store.save(NAME, {"cpu": True})
        assert store.saved(NAME) == ({"bf16": True}, "")
        assert list(store.saved_dir.iterdir()) == [path]

    def test_a_folder_that_cannot_be_made(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(SettingsError, match=r"x\.yaml cannot be written"):
            Settings(tmp_path / "settings.yaml", tmp_path / "file" / "models").save("x", {})

    def test_readers_see_the_old_or_the_new_file_whole(self, tmp_path: Path) -> None:
        file = tmp_path / "x"
        texts = {letter * 100_000 for letter in "ab"}
        write_whole(file, "a" * 100_000)
        done = threading.Event()
        seen: set[str] = set()

        def read() -> None:
            while not done.is_set():
                seen.add(file.read_text(encoding="utf-8"))

        reader = threading.Thread(target=read)
        reader.start()
        for _ in range(30):
            for text in sorted(texts):
                write_whole(file, text)
        done.set()
        reader.join()
        assert seen <= texts


class TestCodeApprovals:
    FILES = (CodeFile("modeling.py", "aa"), CodeFile("config.py", "bb"))

    @pytest.fixture
    def approvals(self, tmp_path: Path) -> CodeApprovals:
        return CodeApprovals(tmp_path / ".cache" / "allowed-code.json")

    def test_nothing_is_allowed_at_first(self, approvals: CodeApprovals) -> None:
        assert not approvals.allowed("m", self.FILES)

    def test_a_yes_counts_for_these_files_of_this_model(self, approvals: CodeApprovals, tmp_path: Path) -> None:
        approvals.allow("m", self.FILES)
        assert approvals.allowed("m", self.FILES)
        assert approvals.allowed("m", tuple(reversed(self.FILES)))
        assert not approvals.allowed("other", self.FILES)
        assert CodeApprovals(tmp_path / ".cache" / "allowed-code.json").allowed("m", self.FILES)  # after a restart

    @pytest.mark.parametrize(
        "files",
        [
            (CodeFile("modeling.py", "ax"), FILES[1]),
            (*FILES, CodeFile("new.py", "cc")),
            FILES[:1],
            (CodeFile("renamed.py", "aa"), FILES[1]),
            (),
        ],
        ids=["changed", "added", "removed", "renamed", "none"],
    )
    def test_other_files_ask_again(self, approvals: CodeApprovals, files: tuple[CodeFile, ...]) -> None:
        approvals.allow("m", self.FILES)
        assert not approvals.allowed("m", files)

    def test_a_second_yes_replaces_the_first(self, approvals: CodeApprovals) -> None:
        approvals.allow("m", self.FILES)
        approvals.allow("m", self.FILES[:1])
        assert not approvals.allowed("m", self.FILES)
        assert approvals.allowed("m", self.FILES[:1])

    def test_a_yes_can_be_taken_back(self, approvals: CodeApprovals, tmp_path: Path) -> None:
        approvals.forget("m")  # nothing was said yet
        approvals.allow("m", self.FILES)
        approvals.allow("n", self.FILES)
        approvals.forget("m")
        assert not approvals.allowed("m", self.FILES)
        assert CodeApprovals(tmp_path / ".cache" / "allowed-code.json").allowed("n", self.FILES)

    def test_code_of_another_repository_cannot_be_allowed(self, approvals: CodeApprovals) -> None:
        files = (*self.FILES, CodeFile("org/name--modeling.Own", ""))
        with pytest.raises(CustomCodeRefused, match=r"org/name--modeling\.Own"):
            approvals.allow("m", files)
        assert not approvals.allowed("m", files)

    def test_many_at_a_time(self, approvals: CodeApprovals) -> None:
        threads = [threading.Thread(target=approvals.allow, args=(f"m{number}", self.FILES)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert all(approvals.allowed(f"m{number}", self.FILES) for number in range(8))

    @pytest.mark.parametrize("text", ["", "[]", "{", '{"version": 1}', '{"version": 1, "models": 3}', '{"version": 9}'])
    def test_a_damaged_file_allows_nothing(self, tmp_path: Path, text: str) -> None:
        file = tmp_path / "allowed.json"
        file.write_text(text)
        assert not CodeApprovals(file).allowed("m", self.FILES)
        CodeApprovals(file).allow("m", self.FILES)
        assert CodeApprovals(file).allowed("m", self.FILES)
