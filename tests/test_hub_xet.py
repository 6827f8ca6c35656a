"""Xet against the Hub of the tests; in a process of its own, as the clients of the other tests have it switched off."""

import os
import subprocess
import sys

import models

SCRIPT = """
import os, pathlib, random, sys, tempfile
from huggingface_hub import CommitOperationCopy, HfApi, hf_hub_download, snapshot_download
from huggingface_hub.utils._runtime import is_xet_available

assert is_xet_available()
api, home = HfApi(), pathlib.Path(os.environ["HF_HOME"])
source = home / "source"
source.mkdir(parents=True)
noise = random.Random(0).randbytes(3 << 20)
files = {
    "noise.bin": noise, "text.parquet": b"the same again " * 200_000, "edited.bin": noise[: 2 << 20] + b"!" + noise[2 << 20 :],
    "floats.safetensors": b"".join(b"\\0\\0" + bytes([i % 256, 63]) for i in range(100_000)), "README.txt": b"text",
}
for name, content in files.items():
    (source / name).write_bytes(content)
api.create_repo("user/xet")
api.upload_file(path_or_fileobj=source / "noise.bin", path_in_repo="noise.bin", repo_id="user/xet")
api.upload_folder(repo_id="user/xet", folder_path=source)
assert pathlib.Path(hf_hub_download("user/xet", "noise.bin")).read_bytes() == noise
there = pathlib.Path(snapshot_download("user/xet"))
assert all((there / name).read_bytes() == content for name, content in files.items())
pull = api.upload_folder(repo_id="user/xet", folder_path=source, path_in_repo="again", create_pr=True)
assert pull.pr_num == 1, pull
api.create_repo("user/other")
copy = CommitOperationCopy("noise.bin", "copied.bin", src_repo_id="user/xet", src_repo_type="model")
api.create_commit("user/other", [copy], commit_message="copy")
"""


PUBLICATION = """
import types
import models, torch
import hf_mimic.hub
from datasets import load_dataset
from huggingface_hub.utils._runtime import is_xet_available
from publications import md5s, rows, scores

from hf_mimic import TrustFilter, load_scores, push_curated_dataset, reference_direction
from hf_mimic.hub_errors import HubError

assert is_xet_available()
hf_mimic.hub.time = types.SimpleNamespace(sleep=lambda seconds: None)

def push(repo_id):
    return push_curated_dataset(rows(), repo_id, scores=scores(), rule=TrustFilter(), figures=False)

done = push("user/xet-curated")
assert done.changed and not push("user/xet-curated").changed
kept = load_dataset("user/xet-curated", split="train")
assert len(kept) == 24 and md5s(kept).items() <= md5s(rows()).items()
assert len(load_scores("user/xet-curated")) == 60
direction = reference_direction(models.make("vit"), "user/xet-teacher")
assert any(v.abs().sum() > 0 for v in direction.values())
try:
    push("user/xet-refused")
except HubError as error:
    print(error)
else:
    raise AssertionError("published although no xorb could be stored")
"""


def run(script, hub, folder):
    """Run a script in a process with Xet; return what it printed."""
    env = {
        **os.environ,
        "HF_HOME": str(folder),
        "HF_TOKEN": hub.token("user"),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    env.pop("HF_HUB_DISABLE_XET")
    done = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_publications_by_xet(hub, tmp_path):
    models.make("vit", seed=1).save_pretrained(tmp_path / "teacher")
    hub.create("user/xet-teacher").commit(tmp_path / "teacher")
    hub.fail("GET", "/api/datasets/user/xet-refused/xet-write-token", times=None, status=403)
    told = run(PUBLICATION, hub, tmp_path / "home")
    assert told.startswith("user/xet-refused: commit failed: the token must not write to it")
    assert len(hub.commits("user/xet-curated")) == 2
    assert not hub.requests("PUT")
    assert hub.requests("POST", "^/xet/v1/xorbs/")
    assert hub.requests("GET", "^/xet/stored/")
    assert list(hub.repo("user/xet-refused").files) == [".gitattributes"]


def test_files_go_up_and_come_back_by_xet(hub, tmp_path):
    run(SCRIPT, hub, tmp_path)
    files = hub.repo("user/xet").files
    assert [len(files[name]) for name in ("noise.bin", "edited.bin", "text.parquet")] == [
        3 << 20,
        (3 << 20) + 1,
        3_000_000,
    ]
    assert not hub.requests("PUT")
    assert hub.requests("POST", "^/xet/v1/xorbs/")
    assert hub.requests("GET", "^/xet/stored/")
    sent = sum(len(r.body) for r in hub.requests("POST", "^/xet/v1/xorbs/"))
    assert sent < 5 << 20  # what is the same is sent once
    assert hub.repo("user/other").files["copied.bin"] == files["noise.bin"]
