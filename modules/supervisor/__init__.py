"""Starts, watches, cancels and ends workers; the one owner of "what is loaded". Imports no ML package."""

from modules.supervisor.answer import Answer
from modules.supervisor.exits import decode_exit
from modules.supervisor.state import Loaded, Snapshot, State
from modules.supervisor.supervisor import Supervisor

__all__ = ["Answer", "Loaded", "Snapshot", "State", "Supervisor", "decode_exit"]
