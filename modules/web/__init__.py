"""The web application: page and API behind one access check, on one port."""

from modules.web.serving import Door, application, listen, listen_address, open_door, serve

__all__ = ["Door", "application", "listen", "listen_address", "open_door", "serve"]
