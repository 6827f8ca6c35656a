"""Notes of a run: what was done survives, a data set's commit is asked for once; tables keep their lines."""

import pytest
from publications import rows

from hf_mimic.hub_errors import HubError
from hf_mimic.run_notes import Notes
from hf_mimic.tables import Table


def test_notes_are_read_back(tmp_path):
    path = tmp_path / "new" / "notes.json"
    assert Notes(path).of("train") is None
    Notes(path).write("train", {"done": False, "values": {"seed": 1}})
    notes = Notes(path)
    notes.write("filter", {"done": True, "values": {}})
    assert Notes(path).of("train") == {"done": False, "values": {"seed": 1}}
    assert Notes(path).of("filter")["done"]


def test_a_commit_is_asked_for_once(api, hub, tmp_path):
    rows(3).push_to_hub("user/noted")
    first = hub.commits("user/noted")[-1].oid
    notes = Notes(tmp_path / "notes.json")
    assert notes.commit("user/noted", None) == first
    notes.write("train", {})
    rows(4).push_to_hub("user/noted")
    hub.clear_log()
    again = Notes(tmp_path / "notes.json")
    assert again.commit("user/noted", None) == first
    assert hub.log == []
    assert again.commit("user/noted", "refs/heads/main") == hub.commits("user/noted")[-1].oid != first
    with pytest.raises(HubError, match="user/noted: looking up v9 failed: there is no such branch, tag or commit"):
        again.commit("user/noted", "v9")


def test_what_is_not_on_the_hub_has_no_commit(hub, tmp_path, monkeypatch):
    notes = Notes(tmp_path / "notes.json")
    for name in (str(tmp_path), "rows.parquet", "some/deep/folder", "./rows"):
        assert notes.commit(name, None) is None
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert notes.commit("user/anything", "v1") == "v1"
    assert (hub.log, notes.commits) == ([], {})


def test_a_table_is_text_with_lines():
    table = Table({"a": 1, "long name": "x"}, "\n\nnext: y")
    assert table == "a          1\nlong name  x\n\nnext: y"
    assert table.lines == {"a": 1, "long name": "x"}
