"""Who counts as one machine, and as one user."""

from __future__ import annotations

from base64 import b64encode

import pytest

from modules.access.credentials import Role
from modules.access.peers import is_loopback, peer, user
from modules.access.sessions import Login


@pytest.mark.parametrize(
    ("address", "expected"),
    [
        ("192.0.2.7", "192.0.2.7"),
        ("::ffff:192.0.2.7", "192.0.2.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::9", "2001:db8:1:2::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::1"),
        ("", ""),
        ("testclient", "testclient"),
    ],
)
def test_a_machine_is_one_whatever_address_of_its_network_it_takes(address: str, expected: str) -> None:
    assert peer(address) == expected


def test_loopback_is_this_machine() -> None:
    assert all(is_loopback(address) for address in ("127.0.0.1", "127.3.2.1", "::1", ""))
    assert not any(is_loopback(address) for address in ("192.0.2.7", "2001:db8:1:2::/64", "testclient"))


def basic(words: str) -> str:
    return f"Basic {b64encode(words.encode()).decode()}"


def test_a_key_is_one_users_in_whatever_form_it_is_sent() -> None:
    forms = ("Bearer key", "bearer key", "BEARER   key ", basic(":key"))
    assert len({user("192.0.2.7", {"authorization": form}) for form in forms}) == 1
    nobody = ("", "Digest 1", "Digest 2", "nonsense")
    assert len({user("192.0.2.7", {"authorization": form}) for form in nobody}) == 1
    browser = [{"cookie": "login=x", "authorization": basic(f"name{at}:x")} for at in range(3)]
    assert {user("192.0.2.7", one) for one in browser} == {user("192.0.2.7", {"cookie": "login=x"})}


def test_others_are_other_users() -> None:
    given = ["Bearer key", "Bearer other", basic("ann:key"), basic("a:nn:key"), ""]
    assert len({user("192.0.2.7", {"authorization": form}) for form in given}) == len(given)
    assert user("192.0.2.8", {"authorization": "Bearer key"}) != user("192.0.2.7", {"authorization": "Bearer key"})
    assert "secretly" not in user("192.0.2.7", {"authorization": "Bearer secretly"})


def test_logins_are_users_by_their_names_and_behind_a_proxy_each_by_itself() -> None:
    logins = [Login(Role.GUEST, name, number, 0.0) for number, name in enumerate(("", "", "ann", "ann", "bob"))]
    assert len({user("192.0.2.7", {}, login) for login in logins}) == 3
    assert len({user("127.0.0.1", {}, login) for login in logins}) == 5
    assert user("192.0.2.7", {}, logins[2]) == user(
        "192.0.2.7", {"authorization": basic("x:y"), "cookie": "z"}, logins[2]
    )
    key = {"authorization": "Bearer key"}
    assert user("127.0.0.1", key, logins[0]) == user("127.0.0.1", key)
