"""What a guest may ask for. Everything else is the administrator's: a new route is refused until it stands here."""

from __future__ import annotations

# Exact paths, or with a * at the end whatever begins so. Guests have a page of their own, whose functions only chat:
# the calls below reach no other.
GUEST_ROUTES = frozenset(
    {
        "GET /", "HEAD /", "GET /config", "GET /theme.css", "GET /assets/*", "GET /static/*", "GET /svelte/*",
        "GET /favicon.ico", "GET /manifest.json", "GET /robots.txt",
        "GET /gradio_api/theme.css", "GET /gradio_api/info", "GET /gradio_api/app_id",
        "GET /gradio_api/startup-events", "GET /gradio_api/heartbeat/*", "POST /gradio_api/queue/join",
        "GET /gradio_api/queue/data", "POST /gradio_api/run/*", "POST /gradio_api/api/*", "POST /gradio_api/call/*",
        "GET /gradio_api/call/*", "POST /gradio_api/reset", "POST /gradio_api/cancel",
        "GET /live/*", "GET /v1/models", "GET /v1/models/*", "POST /v1/chat/completions", "POST /v1/completions",
        "POST /v1/embeddings",
        "GET /v1/internal/model/status", "GET /v1/internal/model/info", "GET /v1/internal/model/list",
        "GET /v1/internal/lora/list", "POST /v1/internal/encode", "POST /v1/internal/decode",
        "POST /v1/internal/token-count",
    }
)  # fmt: skip
OPEN_ROUTES = frozenset({"GET /login", "HEAD /login", "POST /login", "GET /healthz"})  # without a login

_EXACT = frozenset(route for route in GUEST_ROUTES if not route.endswith("*"))
_BEGINNINGS = tuple(route[:-1] for route in GUEST_ROUTES if route.endswith("*"))


def guest_may(method: str, path: str) -> bool:
    """Whether a guest may send this request; ``path`` as it is routed, without a subpath."""
    route = f"{method} {path}"
    plain = "//" not in path and "/.." not in path and "\\" not in path
    return plain and (route in _EXACT or route.startswith(_BEGINNINGS))
