"""Who may ask: Host and Origin, login and keys, and what a guest may not."""

from modules.access.credentials import Credential, Credentials, Role, from_options, new_password
from modules.access.hosts import LOCAL_NAMES, Hosts, host_name, machine_addresses, machine_names, refusal
from modules.access.middleware import MOST_BYTES, AccessMiddleware

__all__ = [
    "LOCAL_NAMES",
    "MOST_BYTES",
    "AccessMiddleware",
    "Credential",
    "Credentials",
    "Hosts",
    "Role",
    "from_options",
    "host_name",
    "machine_addresses",
    "machine_names",
    "new_password",
    "refusal",
]
