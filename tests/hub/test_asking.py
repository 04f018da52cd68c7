"""What people type or paste to name something on the Hub."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from modules.errors import UserError
from modules.hub import Ask, looks_like_a_name, parse


@pytest.mark.parametrize(
    ("text", "ask"),
    [
        ("user/model", Ask("user/model")),
        ("  user/model ", Ask("user/model")),
        ("user/model:gptq-4bit", Ask("user/model", "gptq-4bit")),
        ("user/model:refs/pr/3", Ask("user/model", "refs/pr/3")),
        ("https://huggingface.co/user/model", Ask("user/model")),
        ("https://huggingface.co/user/model/", Ask("user/model")),
        ("huggingface.co/user/model", Ask("user/model")),
        ("hf.co/user/model?library=transformers", Ask("user/model")),
        ("https://huggingface.co/user/model/tree/dev", Ask("user/model", "dev")),
        ("https://huggingface.co/user/model/tree/feature%2Fx", Ask("user/model", "feature/x")),
        ("https://huggingface.co/user/model/tree/main/sub", Ask("user/model", "main", "sub/*")),
        ("https://huggingface.co/user/model/blob/main/a-Q4_K_M.gguf", Ask("user/model", "main", "a-Q4_K_M.gguf")),
        ("https://huggingface.co/user/model/resolve/dev/x/y.json?download=true", Ask("user/model", "dev", "x/y.json")),
        ("https://huggingface.co/user/model/blob/refs/pr/7/a.gguf", Ask("user/model", "refs/pr/7", "a.gguf")),
        ("https://huggingface.co/user/model/discussions/4", Ask("user/model")),
        ("https://HuggingFace.co/user/model#readme", Ask("user/model")),
        ("hf://user/model@dev", Ask("user/model", "dev")),
        ("<https://huggingface.co/user/model>", Ask("user/model")),
    ],
)
def test_names_and_addresses(text: str, ask: Ask) -> None:
    assert parse(text) == ask


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "names no model"),
        ("llama", "names no model"),
        ("small chat model", "names no model"),
        ("a/b/c", "names no model"),
        ("../etc", "names no model"),
        ("user/..", "names no model"),
        ("user/mo--del", "names no model"),
        ("user/model:", ""),
        ("user/model:../x", "is no branch"),
        ("https://huggingface.co/datasets/user/data", "not a model"),
        ("ftp://huggingface.co/user/model", "no address of the Hub"),
        ("https://github.com/user/model", "no address of the Hub"),
        ("https://modelscope.cn/models/user/model", "no address of the Hub"),
        ("https://huggingface.co.example/user/model/blob/main/a.gguf", "no address of the Hub"),
        ("https://huggingface.co@example.org/user/model", "no address of the Hub"),
        ("http://127.0.0.1:8000/user/model", "no address of the Hub"),
        ("https://[huggingface.co/user/model", "no address of the Hub"),
    ],
)
def test_what_names_nothing_is_refused(text: str, words: str) -> None:
    if not words:
        assert parse(text) == Ask("user/model")
        return
    assert not looks_like_a_name(text)
    with pytest.raises(UserError, match=words):
        parse(text)


@pytest.mark.parametrize("mirror", ["http://127.0.0.1:8000", "http://127.0.0.1:8000/hf/"])
def test_an_address_of_the_mirror_in_use(mirror: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_ENDPOINT", mirror)
    assert parse(f"{mirror.rstrip('/')}/user/model/tree/dev") == Ask("user/model", "dev")
    assert parse("https://huggingface.co/user/model") == Ask("user/model")
    with pytest.raises(UserError, match="HF_ENDPOINT"):
        parse("http://127.0.0.1:8001/user/model")


def test_a_pattern_goes_before_the_file_of_an_address() -> None:
    assert parse("https://huggingface.co/user/model/blob/main/a.gguf", "b*.gguf").pattern == "b*.gguf"


def test_the_folder_is_named_after_user_model_and_branch() -> None:
    assert parse("user/model").folder == "user_model"
    assert parse("user/model:refs/pr/3").folder == "user_model_refs_pr_3"


@given(st.text(max_size=60))
def test_no_text_leads_out_of_the_folder(text: str) -> None:
    try:
        folder = parse(text).folder
    except UserError:
        return
    assert "/" not in folder
    assert not folder.startswith(".")
