"""Questions to the Hub: each refusal a sentence of its own, none asked twice; faults of the network asked again."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from modules.errors import (
    BrokenDownload,
    HubForbidden,
    HubTokenRefused,
    HubUnreachable,
    LicenceNotAccepted,
    LoadstoneError,
    NotOnHub,
    UserError,
)
from modules.hub import Hub as Remote
from modules.hub import parse, tokens
from modules.hub.running import run
from tests.hub.test_running import QUICK, assert_whole
from tests.hub_models import order_for, tiny_files, weights
from tests.hub_server import OTHER_TOKEN, TOKEN, Fault, Hub, Repo


def refused(hub: Hub, repo: str, kind: type[LoadstoneError]) -> LoadstoneError:
    """What asking for the repository is refused with; and that it was asked once."""
    hub.requests.clear()
    with pytest.raises(LoadstoneError) as raised:
        Remote(hub.url).repository(parse(repo))
    assert type(raised.value) is kind
    assert len(hub.asked(f"/api/models/{repo.split(':')[0]}/revision")) == 1
    return raised.value


@pytest.fixture
def closed(hub: Hub) -> Hub:
    """Repositories that are not for everybody."""
    hub.repos["user/gated"] = Repo({"main": tiny_files()}, gated=True, accepted=frozenset({TOKEN}))
    hub.repos["user/private"] = Repo({"main": tiny_files()}, readers=frozenset({TOKEN}))
    hub.repos["user/narrow"] = Repo({"main": tiny_files()}, forbidden=frozenset({OTHER_TOKEN}))
    return hub


def test_every_refusal_is_another_sentence(closed: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    said = [
        refused(closed, "user/nothing", NotOnHub),
        refused(closed, "user/model:nowhere", NotOnHub),
        refused(closed, "user/gated", LicenceNotAccepted),
    ]
    monkeypatch.setenv("HF_TOKEN", "hf_mistyped0000000000")
    said.append(refused(closed, "user/model", HubTokenRefused))
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    said += [
        refused(closed, "user/private", NotOnHub),
        refused(closed, "user/gated", LicenceNotAccepted),
        refused(closed, "user/narrow", HubForbidden),
    ]
    assert len({error.message for error in said}) == len(said)
    assert all(f"Accept the licence at {closed.url}/user/gated" in said[place].hint for place in (2, 5))
    assert "(401)" in said[3].message
    assert "(403)" in said[6].message
    assert "nowhere" in said[1].message


def test_with_the_right_token_all_of_it_comes(closed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", closed.url)
    for name in ("gated", "private"):
        order = order_for(closed, tmp_path, f"user/{name}")
        run(order, lambda stage, done: None, QUICK)
        assert_whole(closed, order)


def test_the_token_goes_to_no_other_host(closed: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.setenv("HF_ENDPOINT", closed.url)
    with Hub() as stranger:
        closed.faults = {"tokenizer_config.json": [Fault(redirect=f"{stranger.url}/api/whoami-v2")]}
        order = order_for(closed, tmp_path, "user/private")
        with pytest.raises(LoadstoneError):  # the stranger asks for the token (401), and gets none
            run(order, lambda stage, done: None, QUICK)
        run(order, lambda stage, done: None, QUICK)
        assert stranger.asked("whoami")
        assert all("authorization" not in request.headers for request in stranger.requests)
    assert closed.asked("model.safetensors", cdn=True)
    assert all("authorization" not in request.headers for request in closed.asked(cdn=True))
    assert all(request.headers["authorization"] == f"Bearer {TOKEN}" for request in closed.asked(cdn=False))


def test_the_token_goes_to_no_hub_but_the_one_in_use(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an order may name it that was begun with another HF_ENDPOINT."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    order = order_for(hub, tmp_path)
    hub.requests.clear()
    run(order, lambda stage, done: None, QUICK)
    assert_whole(hub, order)
    assert all("authorization" not in request.headers for request in hub.requests)


def test_a_renamed_repository_is_followed_and_said(hub: Hub, tmp_path: Path) -> None:
    hub.moved["user/old"] = "user/model"
    repository = Remote(hub.url).repository(parse("user/old"))
    assert (repository.name, repository.asked) == ("user/model", "user/old")
    order = order_for(hub, tmp_path, "user/old")
    run(order, lambda stage, done: None, QUICK)
    assert_whole(hub, order)


def test_a_hub_that_is_not_there_or_does_not_answer(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("modules.hub.remote.TRIES", 1)
    with Hub() as gone:
        pass
    with pytest.raises(HubUnreachable, match="cannot be reached"):
        Remote(gone.url).repository(parse("user/model"))
    monkeypatch.setattr("modules.hub.remote.LIMIT_S", 0.3)
    hub.answer_delay_s = 60
    with pytest.raises(HubUnreachable, match="has not answered"):
        Remote(hub.url).search("x")


def test_a_busy_hub_is_asked_again(hub: Hub) -> None:
    hub.faults = {"model": [Fault(status=503, retry_after=0), Fault(status=429, retry_after=0)]}
    assert Remote(hub.url).repository(parse("user/model")).name == "user/model"
    assert len(hub.asked("/api/models/user/model")) == 3


def test_proxies_and_mirrors_of_the_environment_are_used(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proxy is the Hub of the test, which answers for a name that no other machine has."""
    hub.repos["user/small"] = Repo({"main": {"model.safetensors": weights(rows=8), "config.json": b"{}"}})
    monkeypatch.setenv("HTTP_PROXY", hub.url)
    monkeypatch.setenv("HF_ENDPOINT", "http://mirror.invalid/")
    remote = Remote()
    assert remote.endpoint == "http://mirror.invalid"
    repository = remote.repository(parse("user/small"))
    assert remote.bytes_of(repository, "config.json", 0, 2) == b"{}"
    assert [request.headers["host"] for request in hub.requests] == ["mirror.invalid"] * 2
    order = replace(order_for(hub, tmp_path, "user/small"), endpoint=remote.endpoint)
    run(order, lambda stage, done: None, QUICK)
    assert_whole(hub, order)


def test_offline_mode_is_named(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubUnreachable, match="HF_HUB_OFFLINE"):
        Remote(hub.url).repository(parse("user/model"))


def test_search_by_words_task_and_order(hub: Hub) -> None:
    counts = {"safetensors": {"parameters": {"BF16": 1000}, "total": 1000}, "downloads": 5}
    hub.repos["other/Model-B"] = Repo({"main": {}}, info=counts)
    hub.repos["other/Model-T5"] = Repo({"main": {}}, info={"pipeline_tag": "text2text-generation"})
    found = Remote(hub.url).search("model", task="text-generation")
    assert [one.name for one in found] == ["other/Model-B", "user/model"]
    assert (found[0].parameters, found[0].weights_bytes, found[0].downloads) == (1000, 2000, 5)
    [request] = hub.asked("/api/models?")
    assert "sort=downloads" in request.path
    Remote(hub.url).search("", size="min:1B,max:4B", sort="last_modified")
    assert "num_parameters=min%3A1B%2Cmax%3A4B" in hub.requests[-1].path
    assert "sort=lastModified" in hub.requests[-1].path


def test_bytes_of_a_file_by_range(hub: Hub) -> None:
    remote = Remote(hub.url)
    repository = remote.repository(parse("user/model"))
    whole = bytes(hub.repos["user/model"].branches["main"]["model.safetensors"])
    assert remote.bytes_of(repository, "model.safetensors", 8, 300) == whole[8:300]
    assert hub.sent_bytes("model.safetensors") == 292


def test_bytes_of_a_file_from_a_hub_without_ranges(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.faults = {"model.safetensors": [Fault(whole=True), Fault(whole=True)]}
    remote = Remote(hub.url)
    repository = remote.repository(parse("user/model"))
    whole = bytes(hub.repos["user/model"].branches["main"]["model.safetensors"])
    assert remote.bytes_of(repository, "model.safetensors", 8, 300) == whole[8:300]
    monkeypatch.setattr("modules.hub.remote._MOST_SKIPPED_BYTES", 1000)
    with pytest.raises(BrokenDownload, match=r"no part of model\.safetensors, only the whole file"):
        remote.bytes_of(repository, "model.safetensors", 1001, 1100)


def test_a_token_is_kept_once_the_hub_knows_it(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.hf_api.api.endpoint", hub.url)  # of login(), which takes no endpoint
    remote = Remote(hub.url)
    assert not tokens.status().is_there
    with pytest.raises(HubTokenRefused, match="There is no token"):
        tokens.tested(remote)
    with pytest.raises(HubTokenRefused, match="does not know this token"):
        tokens.save(remote, "hf_mistyped0000000000")
    with pytest.raises(UserError, match="no token"):
        tokens.save(remote, "two words")
    assert not tokens.status().is_there
    assert tokens.save(remote, f" {TOKEN}\n") == "tester"
    status = tokens.status()
    assert (status.masked, status.source) == (f"hf_…{TOKEN[-4:]}", "the login of this machine")
    assert tokens.tested(remote) == "tester"
    tokens.forget()
    assert not tokens.status().is_there


def test_the_token_of_the_environment_goes_first(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", OTHER_TOKEN)
    assert tokens.status().source == "HF_TOKEN"
    assert tokens.tested(Remote(hub.url)) == "stranger"
    with pytest.raises(UserError, match="The token of HF_TOKEN is in use"):
        tokens.save(Remote(hub.url), TOKEN)


@pytest.fixture
def logins() -> Path:
    """Two logins of this machine's user, the second in use; the file that keeps them."""
    from huggingface_hub import constants

    stored = Path(constants.HF_STORED_TOKENS_PATH)
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text(f"[personal]\nhf_token = {OTHER_TOKEN}\n[work]\nhf_token = {TOKEN}\n")
    Path(constants.HF_TOKEN_PATH).write_text(TOKEN)
    return stored


def test_forgetting_the_token_leaves_the_other_logins(logins: Path) -> None:
    tokens.forget()
    assert not tokens.status().is_there
    assert (OTHER_TOKEN in logins.read_text(), TOKEN in logins.read_text()) == (True, False)
    tokens.forget()  # of which there is none any more
    assert OTHER_TOKEN in logins.read_text()


def test_a_token_without_a_name_is_forgotten_alone(logins: Path) -> None:
    logins.with_name("token").write_text("hf_ofanolderlogin0000")
    kept = logins.read_text()
    tokens.forget()
    assert not tokens.status().is_there
    assert logins.read_text() == kept


def test_a_token_of_the_environment_is_not_forgotten(logins: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_ofanotherlogin0000")
    kept = logins.read_text()
    with pytest.raises(UserError, match="The token of HF_TOKEN is in use"):
        tokens.forget()
    assert logins.read_text() == kept
    monkeypatch.delenv("HF_TOKEN")
    assert tokens.status().masked == f"hf_…{TOKEN[-4:]}"
