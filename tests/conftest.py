"""Set-up for every test: a Hub on 127.0.0.1 that the real clients use, no other network, one fixed seed."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
import types
from collections.abc import Iterator

from hub import Hub

# NOTE: the clients read these when they are imported, so the server starts before anything of Hugging Face is.
HUB = Hub()
_HOME = tempfile.mkdtemp(prefix="hf_mimic_tests_")
atexit.register(shutil.rmtree, _HOME, ignore_errors=True)
for _name in ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"):
    os.environ.pop(_name, None)
os.environ.update(
    HF_ENDPOINT=HUB.url,
    HF_HOME=_HOME,
    HF_HUB_DISABLE_XET="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    HF_DATASETS_DISABLE_PROGRESS_BARS="1",
    NO_PROXY="127.0.0.1,localhost",
    TOKENIZERS_PARALLELISM="false",
)

import datasets  # noqa: E402
import huggingface_hub  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def hub() -> Iterator[Hub]:
    """Give the Hub with an empty request log, no faults and no settings; repos that a test makes are gone after it.

    Use a repo name of your own all the same: the clients' cache stays.
    """
    HUB.clear_log()
    there = dict(HUB.repos)
    yield HUB
    HUB.repos = there


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Spare huggingface_hub its waits before it tries again; return how long they would have been, in seconds."""
    waited: list[float] = []
    clock = types.SimpleNamespace(sleep=waited.append)
    monkeypatch.setattr("huggingface_hub.utils._http.time", clock)
    monkeypatch.setattr("huggingface_hub.file_download.time", clock)
    return waited


@pytest.fixture
def api(hub: Hub, monkeypatch: pytest.MonkeyPatch, waits: list[float]) -> huggingface_hub.HfApi:
    """Return a client with a new token of "user", who is in the organization "team"; HF_TOKEN is set to it."""
    monkeypatch.setenv("HF_TOKEN", hub.token("user", orgs=["team"]))
    monkeypatch.setattr(datasets.config, "USE_PARQUET_EXPORT", False)  # spares a look-up of datasets-server.127.0.0.1
    return huggingface_hub.HfApi()
