"""A Hugging Face Hub on 127.0.0.1 for the real clients, with the fixture `hub` (log, faults and settings are fresh).

    monkeypatch.setenv("HF_TOKEN", hub.token("user"))            # also role="read", "fine-grained"; orgs, repos
    hub.create("user/data", "datasets", private=True).commit({"a.txt": b"1"})   # or let a client create it
    hub.repo("user/data").files["a.txt"]                         # what is on main now
    fault = hub.fail("POST", "/commit/", status=503, times=2)    # or reset, truncate, delay, corrupt, call; after=True
    assert fault.hits == 2 and len(hub.commits("user/data")) == 3
    hub.requests("PUT", "/lfs/"), hub.uploads("user/data"), hub.downloads("user/data")    # what went over the wire
    hub.login_required, hub.page_size, hub.part_size, hub.lfs_elsewhere = True, 2, 1000, True   # see `clear_log`

Writes need a token; use repo names of your own. Read store.py, wire.py, server.py, then the routes.
"""

from hub.server import Hub
from hub.store import Commit, Repo

__all__ = ["Commit", "Hub", "Repo"]
