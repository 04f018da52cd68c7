"""The Hugging Face Hub: search, ask what a repository holds, choose its files, download them, keep what is here."""

from modules.hub.asking import Ask, is_address, looks_like_a_name, parse
from modules.hub.choosing import Choice, RemoteFile, choose, choose_again
from modules.hub.job import Job, JobState, Order
from modules.hub.queue import DownloadQueue
from modules.hub.remote import SIZES, SORTS, TASKS, Found, Hub, Repository

__all__ = [
    "SIZES",
    "SORTS",
    "TASKS",
    "Ask",
    "Choice",
    "DownloadQueue",
    "Found",
    "Hub",
    "Job",
    "JobState",
    "Order",
    "RemoteFile",
    "Repository",
    "choose",
    "choose_again",
    "is_address",
    "looks_like_a_name",
    "parse",
]
