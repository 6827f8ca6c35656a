"""Files that are whole or not there."""

import subprocess
import sys

import pytest

from hf_mimic.files import write_atomically


def test_written_whole(tmp_path):
    write_atomically(tmp_path / "a", lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"new"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


@pytest.mark.parametrize("stage", ["write", "fsync", "replace"])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch, stage):
    def fail(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "a").write_bytes(b"old")
    if stage != "write":
        monkeypatch.setattr(f"hf_mimic.files.os.{stage}", fail)
    with pytest.raises(OSError, match="No space left"):
        write_atomically(tmp_path / "a", fail if stage == "write" else lambda file: file.write(b"new"))
    assert (tmp_path / "a").read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_disk_that_is_really_full(tmp_path):
    """The kernel's own error, in a process that may write no more than 1,000 bytes to a file."""
    code = (
        "import resource, signal, pathlib, sys\n"
        "from hf_mimic.files import write_atomically\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))\n"
        f"path = pathlib.Path({str(tmp_path)!r}) / 'a'\n"
        "write_atomically(path, lambda file: file.write(b'x' * 900))\n"
        "try:\n"
        "    write_atomically(path, lambda file: file.write(b'y' * 2000))\n"
        "except OSError as error:\n"
        "    sys.exit(0 if path.read_bytes() == b'x' * 900 else 1)\n"
        "sys.exit(2)\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
