"""The login page. It needs nothing but itself: whoever sees it may fetch nothing else."""

from __future__ import annotations

from html import escape

_STYLE = """
:root { color-scheme: light dark; --back: #f8fafc; --card: #fff; --text: #0f172a; --soft: #64748b; --line: #cbd5e1;
  --main: #0d9488; --bad: #b91c1c; }
@media (prefers-color-scheme: dark) { :root { --back: #0f172a; --card: #1e293b; --text: #f1f5f9; --soft: #94a3b8;
  --line: #475569; --main: #14b8a6; --bad: #fca5a5; } }
* { box-sizing: border-box; }
body { margin: 0; min-height: 100dvh; display: grid; place-items: center; padding: 16px; background: var(--back);
  color: var(--text); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, Ubuntu, sans-serif; }
main { width: 100%; max-width: 360px; padding: 28px 24px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; }
h1 { margin: 0 0 4px; font-size: 22px; }
p { margin: 0 0 16px; color: var(--soft); font-size: 14px; }
label { display: block; margin: 12px 0 4px; font-size: 14px; font-weight: 600; }
input { width: 100%; padding: 10px 12px; font: inherit; color: inherit; background: var(--back);
  border: 1px solid var(--line); border-radius: 8px; }
button { width: 100%; margin-top: 20px; padding: 10px; font: inherit; font-weight: 600; color: #fff;
  background: var(--main); border: 0; border-radius: 8px; cursor: pointer; }
input:focus-visible, button:focus-visible { outline: 2px solid var(--main); outline-offset: 2px; }
[role=alert] { margin: 12px 0 0; color: var(--bad); font-size: 14px; }
@media (prefers-color-scheme: dark) { button { color: #042f2e; } }
"""

# The QR code's address ends in #key=…, which a browser sends to nobody: here it is taken over, and out of the bar.
_SCRIPT = """
const key = new URLSearchParams(location.hash.slice(1)).get("key");
if (key) {
  history.replaceState(null, "", location.pathname);
  document.getElementById("password").value = key;
  document.forms[0].requestSubmit();
}
"""


def page(*, with_names: bool, user: str = "", problem: str = "") -> str:
    """The page as HTML. ``with_names``: some credentials have a name that has to be given too."""
    name = (
        '<label for="user">Name</label><input id="user" name="user" autocomplete="username" autocapitalize="none" '
        f'spellcheck="false" value="{escape(user)}">'
        if with_names
        else ""
    )
    hint = "A key goes without a name." if with_names else "The password stands in the terminal that started Loadstone."
    alert = f'<div role="alert">{escape(problem)}</div>' if problem else ""
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Loadstone: log in</title>
<link rel="icon" href="data:,">
<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>
<body><main><h1>Loadstone</h1><p>{hint}</p>
<form method="post" action="login">{name}
<label for="password">Password{" or key" if with_names else ""}</label>
<input id="password" name="password" type="password" autocomplete="current-password" required autofocus>
{alert}<button>Log in</button></form></main><script>{_SCRIPT}</script></body></html>"""
