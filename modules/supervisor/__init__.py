"""Starts, watches, cancels and ends workers; the one owner of "what is loaded". Imports no ML package.

A supervisor owns one model; a fleet owns several supervisors.
"""

from modules.supervisor.answer import Answer
from modules.supervisor.exits import decode_exit
from modules.supervisor.fleet import Fleet, Use
from modules.supervisor.slot import NEVER, Place
from modules.supervisor.state import LOAD_STATES, Loaded, Snapshot, State
from modules.supervisor.supervisor import Supervisor

__all__ = [
    "LOAD_STATES",
    "NEVER",
    "Answer",
    "Fleet",
    "Loaded",
    "Place",
    "Snapshot",
    "State",
    "Supervisor",
    "Use",
    "decode_exit",
]
