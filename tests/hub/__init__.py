"""A small Hugging Face Hub on 127.0.0.1 for the real clients. Read store.py (what is stored), then server.py."""

from hub.server import Hub
from hub.store import Commit, Repo

__all__ = ["Commit", "Hub", "Repo"]
