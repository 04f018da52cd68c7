"""What is printed when the page is up, and the public address through Gradio's tunnel."""

from __future__ import annotations

import io
import logging
import secrets
import sys
from collections.abc import Callable
from typing import TextIO
from urllib.parse import quote

log = logging.getLogger(__name__)


def announce(url: str, network: list[str], password: str, out: TextIO | None = None) -> None:
    """Print where the page is: here, on the network, and the password that was made for it.

    In a terminal the first address on the network, password included, comes as a QR code too. The password stands
    behind ``#``, which a browser sends to nobody.
    """
    out = out or sys.stdout
    print(f"Loadstone runs at {url}", file=out)  # programs that start the server look for this line
    for address in network:
        print(f"On the network:  {address}", file=out)
    if password:
        print(f"Password:        {password}", file=out)
    if network and out.isatty():
        print(qr_code(f"{network[0]}/login#key={quote(password)}" if password else network[0], out.encoding), file=out)
    out.flush()


def qr_code(text: str, encoding: str | None = "utf-8") -> str:
    """``text`` as a QR code of block characters; "" where the terminal cannot show them."""
    import segno

    drawn = io.StringIO()
    segno.make(text, error="l").terminal(drawn, border=2, compact=True)
    try:
        drawn.getvalue().encode(encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return ""
    return drawn.getvalue()


def announce_shared(address: str, password: str, out: TextIO | None = None) -> None:
    """Print the public address."""
    print(f"On the internet: {address}" + (f" (password: {password})" if password else ""), file=out or sys.stdout)
    (out or sys.stdout).flush()


def share(host: str, port: int, with_tls: bool, on_address: Callable[[str], None]) -> None:
    """Open Gradio's tunnel to ``host:port`` and hand its address on. Where that fails, say so: the page stays up."""
    if with_tls:
        log.error("--share does not work together with --ssl-certfile: the tunnel brings its own HTTPS.")
        return
    from gradio.networking import setup_tunnel

    try:
        address = setup_tunnel(host, port, secrets.token_urlsafe(32), None, None)
    except Exception as error:  # the network, the platform, the tunnel's server, its program: all are somebody else's
        log.error(
            "--share: no public address: %s. The page stays up at its own addresses.", error or type(error).__name__
        )
        return
    on_address(address)
