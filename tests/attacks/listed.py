"""The attacks that are tested: README's table, whose every row is shown by the tests that it names."""

from __future__ import annotations

from dataclasses import dataclass

_DOOR, _SLOW, _NAMES, _FUZZ, _CONNECTIONS = (
    "tests/access/test_door.py",
    "tests/attacks/test_slow.py",
    "tests/attacks/test_names.py",
    "tests/attacks/test_fuzz.py",
    "tests/attacks/test_connections.py",
)


@dataclass(frozen=True)
class Attack:
    """``tests``: file::function."""

    attack: str
    outcome: str
    tests: tuple[str, ...]


ATTACKS = (
    Attack(
        "DNS rebinding: another name that leads here",
        "403, by the request's Host and what a proxy forwards of it",
        (f"{_DOOR}::test_pages_of_elsewhere_are_refused_with_a_key_too", "tests/access/test_hosts.py::test_refusal"),
    ),
    Attack(
        "A page of elsewhere sends JSON, a form or text/plain; `Origin: null`",
        "403, by Origin and Sec-Fetch-Site",
        (f"{_DOOR}::test_pages_of_elsewhere_are_refused_with_a_key_too", "tests/access/test_hosts.py::test_refusal"),
    ),
    Attack(
        "No key, or a wrong one, on every route of page and API", "401", (f"{_DOOR}::test_no_route_answers_nobody",)
    ),
    Attack(
        "A guest asks for every route, and every function of the page, that is the administrator's",
        "403",
        (
            f"{_DOOR}::test_a_guest_is_refused_what_is_not_listed",
            f"{_DOOR}::test_a_guest_cannot_call_the_administrators_functions",
        ),
    ),
    Attack(
        "Guessing passwords, alone, in parallel, from many addresses",
        "each wrong one doubles the wait; one request at a time waits, the others get 429; who knows a long secret "
        "is let in meanwhile",
        (
            f"{_DOOR}::test_a_flood_of_wrong_keys_is_slowed_down_and_keeps_no_right_one_out",
            f"{_DOOR}::test_wrong_keys_count_for_a_machine_whatever_address_of_its_network_it_takes",
            "tests/access/test_credentials.py::test_many_addresses_together_are_slowed_down_but_nobody_is_kept_out_for_long",
        ),
    ),
    Attack(
        "Names that lead out of their folder: of models, LoRAs, downloads, merges, copies and settings, in every field "
        "of every route and of the page",
        "refused; nothing outside is read or written",
        (
            f"{_NAMES}::test_no_name_in_a_request_leads_out_of_its_folder",
            f"{_NAMES}::test_no_name_given_to_the_page_leads_out_of_its_folder",
            f"{_NAMES}::test_saved_settings_stay_in_the_folder_for_models",
        ),
    ),
    Attack(
        "`/gradio_api/file=` and the other routes of Gradio's that read, relay or take files",
        "no file of this machine is given out, and none written but where uploads belong",
        (f"{_NAMES}::test_no_file_is_given_out", f"{_NAMES}::test_an_uploaded_file_lands_where_gradio_keeps_them"),
    ),
    Attack(
        "A load over HTTP with trust_remote_code, or with a folder to write to",
        "403, 422; no code runs",
        (f"{_NAMES}::test_no_code_of_a_model_runs_for_a_request",),
    ),
    Attack(
        "A body of 100 MB",
        "413 before it comes, or after 32 MiB where its length is not said; the memory goes back",
        (f"{_SLOW}::test_a_body_of_100_mb_is_refused_before_it_comes",),
    ),
    Attack(
        "A chat of a million messages; a body that is wrong in millions of places",
        "400 for the first few, or 413 before it is parsed",
        (
            f"{_DOOR}::test_a_body_of_very_many_brackets_is_not_parsed",
            "tests/api/openai/test_bodies.py::test_parts_have_a_bound_for_all_messages_together",
            f"{_DOOR}::test_a_chat_of_very_many_messages_is_refused_at_once",
            "tests/api/openai/test_bodies.py::test_a_body_of_many_errors_is_refused_for_a_few",
        ),
    ),
    Attack(
        "Large bodies from one guest, all at once, that do not come to an end",
        "503 beyond half of 512 MiB; others are served",
        ("tests/access/test_middleware.py::test_large_bodies_of_one_user_leave_room_for_others",),
    ),
    Attack("A flood of headers", "400", (f"{_SLOW}::test_a_flood_of_headers_is_refused",)),
    Attack(
        "Clients that send byte by byte",
        "others are served; a head has 20 s, a body two minutes",
        (
            f"{_SLOW}::test_slow_senders_hold_nobody_up",
            f"{_SLOW}::test_requests_that_do_not_come_to_an_end_are_given_up",
        ),
    ),
    Attack(
        "Connections without end, from one address, without a login",
        "closed beyond a quarter of those that may be open; others are served",
        (
            f"{_CONNECTIONS}::test_connections_of_one_address_keep_nobody_out",
            f"{_CONNECTIONS}::test_an_address_has_a_quarter_of_all_connections",
        ),
    ),
    Attack(
        "Clients that read a stream slowly",
        "others are served",
        (f"{_SLOW}::test_slow_readers_of_streams_hold_nobody_up",),
    ),
    Attack(
        "A guest asks for every answer that may be waited for",
        "503 beyond half of the places; others are served",
        (f"{_SLOW}::test_one_guest_does_not_take_all_places",),
    ),
    Attack(
        "A guest asks for every stream of the status that may be open",
        "503 beyond a quarter of them; others are served",
        ("tests/api/test_status.py::test_one_user_leaves_streams_to_the_others",),
    ),
    Attack(
        "A guest unloads a model, or keeps it loaded, by `keep_alive`",
        "403",
        (f"{_DOOR}::test_how_long_a_model_stays_is_the_administrators_to_say",),
    ),
    Attack(
        "NaN, numbers of 5,000 digits, half characters, 100,000 brackets, in every field",
        "a typed error, no 5xx",
        (
            f"{_FUZZ}::test_no_field_of_any_body_fails_whatever_it_holds",
            f"{_DOOR}::test_half_characters_are_refused_and_break_nothing",
        ),
    ),
    Attack(
        "What schemathesis makes of the API's own description",
        "no 5xx",
        (f"{_FUZZ}::test_no_route_fails_whatever_schemathesis_makes_of_its_description",),
    ),
    Attack(
        "A model whose chat template loops, grows or computes for ever",
        "ended after 10 s or 2 GiB with a typed error",
        (
            "tests/worker/test_templates.py::test_a_template_that_runs_on_is_ended",
            "tests/worker/test_templates.py::test_memory_that_grows_ends_a_template",
            "tests/worker/test_templates.py::test_arithmetic_that_nothing_can_interrupt_is_refused",
        ),
    ),
)


def table() -> str:
    """In Markdown."""
    return "\n".join(
        ["| attack | what happens |", "|---|---|", *(f"| {one.attack} | {one.outcome} |" for one in ATTACKS)]
    )
