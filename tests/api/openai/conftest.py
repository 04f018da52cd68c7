"""One real server, with a model whose chat template knows tools and thinking, for OpenAI's official client."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from openai import OpenAI

from tests import loras
from tests.e2e.conftest import Server, serving

KEY = "guest-key"
ADMIN_KEY = "admin-key"
MODEL = "talker"
TEMPLATE = """
{%- if tools %}<|im_start|>system
You may call functions. <tools>{% for tool in tools %}{{ tool | tojson }}{% endfor %}</tools>
Write <tool_call>{"name": NAME, "arguments": ARGUMENTS}</tool_call>.<|im_end|>
{% endif %}
{%- for message in messages %}<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% elif false %}</think>{% endif %}{% endif %}"""


@pytest.fixture(scope="session")
def api(demo_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server, with the model loaded. The demo model's files, with another chat template."""
    home = tmp_path_factory.mktemp("api")
    folder = home / "models" / MODEL
    folder.mkdir(parents=True)
    for file in demo_model.iterdir():
        if file.name != "chat_template.jinja":
            (folder / file.name).symlink_to(file)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    shutil.copytree(loras.herring(), home / "loras" / "herring")
    with serving(home, "--api-key", KEY, "--admin-key", ADMIN_KEY, "--no-warm-worker") as server:
        admin = httpx.Client(base_url=server.url, headers={"authorization": f"Bearer {ADMIN_KEY}"}, timeout=120)
        loaded = admin.post("/v1/internal/model/load", json={"model_name": MODEL, "args": {"ctx_size": 512}})
        assert loaded.status_code == 200, loaded.text
        yield server


@pytest.fixture(scope="session")
def client(api: Server) -> OpenAI:
    """The official client with a guest's key. It tries nothing again, so that each failure is seen."""
    return OpenAI(base_url=f"{api.url}/v1", api_key=KEY, max_retries=0, timeout=120)


@pytest.fixture(scope="session")
def internal(api: Server) -> Iterator[httpx.Client]:
    """Plain requests with the guest's key."""
    with httpx.Client(base_url=api.url, headers={"authorization": f"Bearer {KEY}"}, timeout=60) as http:
        yield http
