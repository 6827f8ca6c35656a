"""Xet against the Hub of the tests; in a process of its own, as the clients of the other tests have it switched off."""

import os
import subprocess
import sys

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


def test_files_go_up_and_come_back_by_xet(hub, tmp_path):
    env = {**os.environ, "HF_HOME": str(tmp_path), "HF_TOKEN": hub.token("user")}
    env.pop("HF_HUB_DISABLE_XET")
    done = subprocess.run([sys.executable, "-c", SCRIPT], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
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
