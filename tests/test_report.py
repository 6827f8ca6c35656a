"""`build_report` and `hf-mimic report`: what stands in the files, data that must not be executed, bad input, images."""

import base64
import hashlib
import html.parser
import io
import json
import re
import sys
from pathlib import Path

import datasets
import numpy as np
import pytest
from datasets import ClassLabel, Value
from PIL import Image
from reports import EVIL, NAMES, NAN, encoded, images_of, plain, table_of

import hf_mimic
from hf_mimic import attach_scores
from hf_mimic.cli import main
from hf_mimic.data import load_rows
from hf_mimic.pairs import identified
from hf_mimic.report import build_report
from hf_mimic.report_health import health_numbers, last_checkpoint, read_health
from hf_mimic.report_html import page_data, safe_json, shortened
from hf_mimic.report_options import ReportOptions
from hf_mimic.report_rows import default_cut, read_labels, read_rows, row_ids
from hf_mimic.scores import ScoreTable
from hf_mimic.thumbnails import make_thumbnails, small_rgb
from hf_mimic.trust import most_f1

PACKAGE = Path(hf_mimic.__file__).parent
SCORES = np.array([-0.4, -0.2, 0.1, 0.2, 0.3, 0.5])
LABELS = [0, 1, 2, 0, 1, 2]


@pytest.fixture(autouse=True)
def _no_figures(monkeypatch):
    """Leave out the slowest part; a test of figures takes this back."""
    monkeypatch.setattr("hf_mimic.report.draw_figures", lambda *_: [])


def page_of(report):
    return report.html.read_text(encoding="utf-8")


def block(page):
    """Return the data of a page."""
    return json.loads(re.search(r'<script id="data" type="application/json">(.*?)</script>', page, re.S)[1])


def unpacked(text, kind):
    return np.frombuffer(base64.b64decode(text), kind)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """Return a report with every part."""
    folder = tmp_path_factory.mktemp("report")
    weights = np.exp(SCORES) / np.exp(SCORES).mean()
    table = table_of(SCORES, epochs=3, relative_weight=weights, loss=1 - SCORES)
    rows = images_of(LABELS, captions=["a", "bb", "ccc", "dd dd", EVIL, "ffffff"])
    return build_report(
        table,
        folder,
        dataset=rows,
        filters={"ours": SCORES > 0, "mine": SCORES > 0.15},
        compare={"a": {"noise": 0.0, "retained": 0.9}, "b": {"noise": 0.4, "retained": 0.6}},
        health={"score_fit_correlation": 0.3, "unhealthy": 0.0},
        options=ReportOptions(title=f"Scores {EVIL}", space=True),
    )


# ---- what is written -----------------------------------------------------------------------------------------------


def test_numbers(written):
    found = json.loads(written.json.read_text(encoding="utf-8"))
    assert found == written.numbers
    assert (found["score"], found["cut"]["value"]) == ("mimic_score", 0.0)
    assert (found["cut"]["kept"], found["cut"]["dropped"]) == (4, 2)
    assert [(c["class"], c["count"], c["kept"]) for c in found["classes"]] == [
        ("ant", 2, 1),
        ("bee", 2, 1),
        ("cat", 2, 2),
    ]
    assert [row["epoch"] for row in found["epochs"]["epochs"]] == [0, 1, 2]
    assert found["epochs"]["epochs"][0]["mean"] == pytest.approx(SCORES.mean() - 0.01)
    assert found["drift"]["rank_correlation"][0][2] == pytest.approx(1)
    assert found["agreement"]["equal"][0][1] == pytest.approx(5 / 6)
    assert [s["id"] for s in found["best"]] == [5, 4, 3]
    assert [s["id"] for s in found["worst"]] == [0, 1, 2]
    assert found["images"] == {"shown": 6}
    assert found["caption_length"]["captions"] == 6
    assert found["health"]["verdict"] == "The run found the score informative."
    assert found["missing"] == {}


def test_figures(written):
    stems = {path.stem for path in written.figures}
    names = {"score_by_epoch", "best_and_worst", "quality", "caption_length", "classes", "confusions", "agreement"}
    assert stems == names | {"drift"}
    for path in written.figures:
        if path.suffix == ".png":
            with Image.open(path) as picture:
                assert picture.size[0] > 300
        else:
            assert "<svg" in path.read_text(encoding="utf-8")


def test_the_readme_of_a_space(written):
    import yaml

    text = (written.html.parent / "README.md").read_text(encoding="utf-8")
    front = yaml.safe_load(text.split("---")[1])
    assert (front["sdk"], front["app_file"]) == ("static", "report.html")
    assert front["title"] == f"Scores {EVIL}"


def test_the_page_holds_every_row_in_the_order_of_the_score(written):
    data = block(page_of(written))
    np.testing.assert_allclose(unpacked(data["scores"], "<f4"), SCORES, rtol=1e-5)
    assert unpacked(data["ids"], "<i8").tolist() == [0, 1, 2, 3, 4, 5]
    assert unpacked(data["labels"], "<i4").tolist() == LABELS
    assert data["captions"][4] == EVIL
    assert unpacked(data["pictured"], "<i4").tolist() == [0, 1, 2, 3, 4, 5]
    assert Image.open(io.BytesIO(base64.b64decode(data["pictures"][0]))).size == (20, 16)


class Tags(html.parser.HTMLParser):
    """Collects the tags, the names of their attributes, and every address."""

    def __init__(self):
        super().__init__()
        self.tags, self.addresses, self.names = [], [], set()

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.names |= {name for name, _ in attrs}
        self.addresses += [(tag, value) for name, value in attrs if name in ("src", "href", "action", "srcset")]


def test_data_are_never_markup(written):
    page = page_of(written)
    parser = Tags()
    parser.feed(page)
    assert parser.tags.count("script") == 2
    assert page.count("</script") == 2
    assert "<b>&amp;" not in page
    assert all(value.startswith(("#", "data:")) for _, value in parser.addresses)
    assert not re.search(r"https?://(?!www\.w3\.org/2000/svg)", page)
    sources = [p.read_text(encoding="utf-8") for p in (PACKAGE / "report_page").glob("*.js")]
    assert sources
    assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(|\| *safe", "".join(sources))


def test_only_the_scripts_of_the_package_may_run(written):
    page = page_of(written)
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', page)[1].replace("&#39;", "'")
    script = re.findall(r"<script>(.*?)</script>", page, re.S)
    style = re.findall(r"<style>(.*?)</style>", page, re.S)
    for text, kind in ((script, "script"), (style, "style")):
        assert len(text) == 1
        digest = base64.b64encode(hashlib.sha256(text[0].encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert "unsafe" not in policy
    parser = Tags()
    parser.feed(page)
    assert not {name for name in parser.names if name == "style" or name.startswith("on")}


def test_json_in_a_script_is_safe_and_the_same():
    value = {"a": EVIL, "b": "\u2029 & <!-- <script>", "c": [1.5, None, "日本"]}
    text = safe_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert "日本" in text
    assert json.loads(text) == value
    with pytest.raises(ValueError, match="Out of range float values are not JSON compliant"):
        safe_json(NAN)


def test_files_of_the_page_are_short_and_packaged():
    for path in (PACKAGE / "report_page").iterdir():
        assert len(path.read_text(encoding="utf-8").splitlines()) < 300
    assert re.search(
        r'hf_mimic = \[.*"report_page/\*"', (PACKAGE.parent / "pyproject.toml").read_text(encoding="utf-8")
    )


def test_the_same_report_twice(tmp_path, monkeypatch):
    monkeypatch.undo()
    for name in ("one", "two"):
        build_report(table_of(SCORES, epochs=2), tmp_path / name, dataset=images_of(LABELS))
    for path in (tmp_path / "one").rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "two" / path.relative_to(tmp_path / "one")).read_bytes()


# ---- scores of every kind ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scores",
    [
        [0.5, 0.5, 0.5],
        [1.0, -1.0],
        [0.25],
        [NAN, 0.1, NAN],
        [1e-30, 2e-30, 3e-30],
        [1e30, -1e30, 0.0],
        [0.0, 0.0, 0.0],
    ],
)
def test_scores_of_every_kind_make_a_page(tmp_path, scores):
    report = build_report(table_of(scores, epochs=2, shift=0), tmp_path, dataset=images_of([0] * len(scores)))
    data = block(page_of(report))
    known = np.sort(np.float32(scores)[np.isfinite(scores)])
    np.testing.assert_allclose(unpacked(data["scores"], "<f4"), known, rtol=1e-6)
    notes = " ".join(report.numbers["notes"])
    assert ("All scores are equal" in notes) == (len(known) > 1 and np.ptp(known) == 0)
    assert ("have no score" in notes) == bool(np.isnan(scores).any())
    assert report.numbers["confusions"] is None
    assert report.numbers["missing"]["confusions"] == "Confusions need labels of at least two classes."


def test_no_score_at_all(tmp_path):
    with pytest.raises(ValueError, match=r"got none: all of them are null in 3 rows\. Look at the log"):
        build_report(table_of([NAN] * 3), tmp_path)
    with pytest.raises(ValueError, match="must have scores or a data set with score columns, got neither"):
        build_report(None, tmp_path)
    with pytest.raises(
        ValueError, match=r"the score 'trust' must have values, got none in 6 rows\. There are: mimic_score"
    ):
        build_report(table_of(SCORES), tmp_path, options=ReportOptions(score="trust"))
    with pytest.raises(
        ValueError, match=r"`score` must be one of 'trust', .*, got 'mimic'\. Did you mean 'mimic_score'"
    ):
        build_report(table_of(SCORES), tmp_path, options=ReportOptions(score="mimic"))


def test_the_default_cut_of_each_score():
    trust = np.random.default_rng(0).beta(1, 1, 400)
    rows = read_rows(table_of(trust, ref_trust=trust, relative_weight=trust), None, ReportOptions())
    assert rows.score_name == "trust"
    cut, why = default_cut(rows)
    exact = most_f1(rows.score[np.isfinite(rows.score)].astype(float))
    assert (rows.score >= cut).sum() == (rows.score.astype(float) >= exact).sum()
    assert len(repr(cut)) <= 8
    assert "TrustFilter" in why
    cuts = {}
    for name in ("mimic_score", "relative_weight", "ref_trust"):
        cuts[name] = default_cut(
            read_rows(table_of(trust, ref_trust=trust, relative_weight=trust), None, ReportOptions(score=name))
        )[0]
    assert (cuts["mimic_score"], cuts["relative_weight"]) == (0.0, 1.0)
    table = ScoreTable()
    table.record(np.arange(4), epoch=0, step=0, clip_score=[0.1, 0.2, 0.3, 0.4])
    assert default_cut(read_rows(table, None, ReportOptions()))[0] == pytest.approx(0.25, abs=0.05)


def test_a_cut_is_not_rounded_to_float32(tmp_path):
    """The nearest float32 to 0.55613 is below it: `s >= 0.55613` drops it, and so must we."""
    assert float(np.float32(0.55613)) < 0.55613
    report = build_report(table_of([0.55613, 0.7]), tmp_path, options=ReportOptions(cut=0.55613))
    assert report.numbers["cut"]["kept"] == 1


def test_a_cut_of_ones_own(tmp_path):
    report = build_report(table_of(SCORES), tmp_path, options=ReportOptions(cut=0.25))
    assert (report.numbers["cut"]["value"], report.numbers["cut"]["kept"]) == (0.25, 2)
    with pytest.raises(ValueError, match="`cut` must be a finite number, got nan"):
        build_report(table_of(SCORES), tmp_path, options=ReportOptions(cut=NAN))


# ---- scores and data set -------------------------------------------------------------------------------------------


def test_rows_are_joined_by_id_whatever_their_order():
    rows = images_of(LABELS).select([4, 0, 5, 2])
    found = read_rows(table_of(SCORES), rows, ReportOptions())
    assert found.ids.tolist() == [4, 0, 5, 2]
    np.testing.assert_allclose(found.score, SCORES[[4, 0, 5, 2]], rtol=1e-6)
    assert found.by_row(SCORES > 0).tolist() == [True, False, True, True]
    assert "2 of 6 scored samples are not in the data set and are left out." in found.notes


def test_ids_of_every_kind():
    rows = images_of(LABELS)
    assert row_ids(rows.select([3, 1]), "sample_id").tolist() == [3, 1]
    assert row_ids(rows.remove_columns("sample_id").select([3, 1]), "sample_id").tolist() == [0, 1]
    named = rows.add_column("name", ["a", "b", "c", "d", "e", "f"])
    assert row_ids(named, "name").tolist() == identified(named, "name")["name"][:]
    with pytest.raises(ValueError, match="the column `label` must hold unique ids, got 3 repeated"):
        row_ids(rows, "label")


def test_a_shuffled_data_set_without_ids_is_not_copied(monkeypatch):
    rows = images_of(LABELS).remove_columns("sample_id").shuffle(seed=0)
    monkeypatch.setattr("datasets.Dataset.flatten_indices", lambda *_, **__: pytest.fail("the rows were copied"))
    assert read_rows(table_of(SCORES), rows, ReportOptions()).ids.tolist() == [0, 1, 2, 3, 4, 5]


def test_rows_without_a_score_are_kept_and_counted(tmp_path):
    report = build_report(table_of(SCORES[:4]), tmp_path, dataset=images_of(LABELS), filters={"a": SCORES[:4] > 0})
    assert report.numbers["summary"]["scored"] == 4
    assert report.numbers["cut"] | {"why": ""} == {
        "value": 0.0,
        "why": "",
        "kept": 4,
        "dropped": 2,
        "kept_share": 4 / 6,
    }
    assert "2 of 6 rows have no score. They are kept unless you say otherwise." in report.numbers["notes"]
    assert report.numbers["agreement"]["kept"] == [{"kept": 2, "kept_share": 0.5}]
    assert unpacked(block(page_of(report))["ids"], "<i8").tolist() == [0, 1, 2, 3, 4, 5]


def test_scores_of_another_data_set():
    message = (
        r"must belong together: .* got 6 rows, 6 scored samples, {} ids in both\. Give the data set that was scored"
    )
    with pytest.raises(ValueError, match=message.format(0)):
        read_rows(table_of(SCORES, ids=np.arange(100, 106)), images_of(LABELS), ReportOptions())
    with pytest.raises(ValueError, match=message.format(2)):
        read_rows(table_of(SCORES, ids=np.arange(4, 10)), images_of(LABELS), ReportOptions())
    with pytest.warns(
        UserWarning, match="1 of 6 rows have no scores, and 1 of 6 scored samples are not in the data set"
    ):
        read_rows(table_of(SCORES, ids=np.arange(1, 7)), images_of(LABELS), ReportOptions())
    with pytest.raises(
        ValueError, match=r"ids are row numbers, up to 5, but the scores have an id 6 \(6 rows, 6 scored"
    ):
        read_rows(
            table_of(SCORES, ids=np.arange(1, 7)), images_of(LABELS).remove_columns("sample_id"), ReportOptions()
        )


@pytest.mark.parametrize("role", ["image", "label", "text"])
def test_a_column_that_is_named_must_be_there(role):
    with pytest.raises(
        ValueError, match=f"must have the column 'x', got sample_id, image, label. Name yours with {role}_"
    ):
        read_rows(table_of(SCORES), images_of(LABELS), ReportOptions(**{f"{role}_column": "x"}))


def test_without_labels_images_or_data_set(tmp_path):
    bare = images_of(LABELS).remove_columns(["image", "label"])
    report = build_report(table_of(SCORES), tmp_path / "a", dataset=bare)
    notes = " ".join(report.numbers["notes"])
    assert "has no image column" in notes
    assert "has no label column" in notes
    assert report.numbers["missing"]["classes"] == "There are no labels."
    alone = build_report(table_of(SCORES), tmp_path / "b")
    assert "No data set was given: there are no images, labels or captions." in alone.numbers["notes"]
    with pytest.raises(ValueError, match="'image' must hold images, got Value"):
        build_report(table_of(SCORES), tmp_path, dataset=bare.add_column("image", ["x.png"] * 6))


@pytest.mark.parametrize(
    ("labels", "kind", "codes", "names"),
    [
        (["b", "a", None, "b"], Value("string"), [1, 0, -1, 1], ["a", "b"]),
        ([10, 9, None, 10], Value("int64"), [1, 0, -1, 1], ["9", "10"]),
        ([0.5, NAN, None, 0.25], Value("float32"), [1, -1, -1, 0], ["0.25", "0.5"]),
        ([True, False, True, None], Value("bool"), [1, 0, 1, -1], ["False", "True"]),
        ([2, -1, None, 0], ClassLabel(names=NAMES), [2, -1, -1, 0], NAMES),
        ([None] * 4, Value("string"), [-1] * 4, []),
    ],
)
def test_labels_of_every_kind(labels, kind, codes, names):
    found, classes = read_labels(images_of(labels, kind=kind), "label")
    assert (found.tolist(), classes) == (codes, names)


def test_several_labels_per_row():
    with pytest.raises(ValueError, match="'label' must hold one label per row, got List"):
        read_labels(images_of([[0], [1]], kind=datasets.List(Value("int64"))), "label")


def test_a_data_set_that_has_its_scores(tmp_path):
    table = table_of(SCORES[:5])
    with pytest.warns(UserWarning, match="1 of 6 rows have no score"):
        scored = attach_scores(images_of(LABELS), table, keep=SCORES[:5] > 0)
    report = build_report(None, tmp_path, dataset=scored)
    assert report.numbers["summary"]["scored"] == 5
    assert report.numbers["missing"]["epochs"].startswith("Scores that are columns have no epochs")
    with pytest.raises(
        ValueError, match=r"must have a score column \(trust, mimic_score.*\), got sample_id, image, label"
    ):
        build_report(None, tmp_path, dataset=images_of(LABELS))


def test_filters_must_fit():
    message = r"the filter 'a' must have one boolean per scored sample, 6, got "
    with pytest.raises(ValueError, match=message + r"bool of shape \(3,\)"):
        build_report(table_of(SCORES), "unused", filters={"a": np.ones(3, bool)})
    with pytest.raises(ValueError, match=message + r"int64 of shape \(6,\)"):  # ids, say
        build_report(table_of(SCORES), "unused", filters={"a": np.arange(6)})
    with pytest.raises(ValueError, match="the quality of 'a' must be names and numbers, got float"):
        build_report(table_of(SCORES), "unused", compare={"a": 0.3})
    with pytest.raises(ValueError, match="`features` must come with a data set, got none"):
        build_report(table_of(SCORES), "unused", options=ReportOptions(features=np.eye(6)))


def test_features_of_ones_own_find_the_neighbours(tmp_path):
    features = np.eye(3)[[0, 1, 2, 0, 1, 1]] + 0.01
    options = ReportOptions(features=features, cut=-1.0)
    found = build_report(table_of(SCORES), tmp_path, dataset=images_of(LABELS), options=options).numbers["confusions"]
    assert (found["asked"], found["by"], found["neighbours"]) == (6, "the features that were given", 5)
    pixels = build_report(table_of(SCORES), tmp_path, dataset=images_of(LABELS)).numbers["confusions"]
    assert pixels["by"].startswith("the pixels (8 x 8) of the 6 pictures")


# ---- images --------------------------------------------------------------------------------------------------------

RED = (200, 30, 40)


def turned():
    exif = Image.Exif()
    exif[0x0112] = 6  # rotate by 90 degrees
    return encoded(Image.new("RGB", (40, 20), RED), "JPEG", exif=exif.tobytes(), quality=95)


def of_mode(mode):
    return Image.new("RGB", (12, 12), RED).convert(mode)


@pytest.mark.parametrize(
    ("cell", "size", "color"),
    [
        (encoded(of_mode("CMYK"), "JPEG", quality=95), (12, 12), RED),
        (encoded(of_mode("P")), (12, 12), (204, 51, 51)),
        (encoded(of_mode("L")), (12, 12), (82, 82, 82)),
        (encoded(of_mode("1")), (12, 12), None),
        (encoded(Image.fromarray(np.full((12, 12), 0x8000, np.uint16))), (12, 12), (128, 128, 128)),
        (encoded(Image.fromarray(np.full((12, 12), 70_000, np.int32)), "TIFF"), (12, 12), (0, 0, 0)),
        (encoded(Image.new("RGBA", (12, 12), (*RED, 0))), (12, 12), (255, 255, 255)),
        (encoded(Image.new("RGBA", (12, 12), (*RED, 255))), (12, 12), RED),
        (encoded(Image.new("LA", (12, 12), (9, 0))), (12, 12), (255, 255, 255)),
        (encoded(of_mode("P"), transparency=of_mode("P").getpixel((0, 0))), (12, 12), (255, 255, 255)),
        (encoded(Image.new("RGB", (12, 12), RED), transparency=RED), (12, 12), (255, 255, 255)),
        (turned(), (20, 40), RED),
        (encoded(Image.new("RGB", (400, 100), RED)), (64, 16), RED),
        (encoded(Image.new("RGB", (1, 3000), RED)), (1, 64), RED),
    ],
)
def test_pictures_of_every_kind(cell, size, color):
    picture = small_rgb(cell, 64)
    assert (picture.mode, picture.size) == ("RGB", size)
    if color is not None:
        np.testing.assert_allclose(np.asarray(picture)[size[1] // 2, size[0] // 2], color, atol=6)


def test_broken_and_missing_images_are_counted(tmp_path):
    whole = plain()["bytes"]
    cells = [plain(), {"bytes": whole[:40], "path": None}, None, {"bytes": b"no image", "path": None}, plain(9)]
    cells.append({"bytes": None, "path": str(tmp_path / "gone.png")})
    rows = images_of(LABELS, pictures=cells)
    found = make_thumbnails(rows, np.arange(6))
    assert sorted(found.data) == [0, 4]
    assert found.broken[2] == "no image"
    assert found.counts()["shown"] == 2
    report = build_report(table_of(SCORES), tmp_path, dataset=rows)
    notes = " ".join(report.numbers["notes"])
    assert "3 of the images looked at do not decode (" in notes
    assert "1 of the rows looked at have no image." in notes
    assert unpacked(block(page_of(report))["broken"], "<i4").tolist() == [1, 2, 3, 5]


def test_no_image_is_decoded_that_is_not_shown(tmp_path, monkeypatch):
    rows, decoded = images_of([i % 3 for i in range(300)]), []
    decode = datasets.Image.decode_example

    def counted(self, value, *args, **kwargs):
        decoded.append(value["bytes"])
        return decode(self, value, *args, **kwargs)

    monkeypatch.setattr(datasets.Image, "decode_example", counted)
    scores = np.random.default_rng(0).normal(size=300)
    options = ReportOptions(max_images=20)
    report = build_report(table_of(scores), tmp_path, dataset=rows, options=options)
    assert len(decoded) == 20
    assert report.numbers["images"] == {"shown": 20}
    assert "There are pictures of 20 of 300 rows on this page." in report.numbers["notes"]
    decoded.clear()
    build_report(table_of(scores), tmp_path, dataset=rows, options=ReportOptions(max_images=0))
    assert decoded == []


def test_a_large_set_is_sampled_and_says_so(tmp_path):
    scores = np.random.default_rng(0).normal(size=300)
    options = ReportOptions(max_rows=50, max_images=10)
    report = build_report(table_of(scores), tmp_path, dataset=images_of([i % 3 for i in range(300)]), options=options)
    assert len(unpacked(block(page_of(report))["scores"], "<f4")) == 50
    assert "This page holds a sample of 50 of 300 rows" in page_of(report)
    assert sum(c["count"] for c in report.numbers["classes"]) == 300
    assert [s["id"] for s in report.numbers["best"]][:3] == np.argsort(-scores)[:3].tolist()


def test_a_transform_on_the_data_set_is_not_run(tmp_path):
    rows = images_of(LABELS).with_transform(lambda batch: pytest.fail("a transform was run"))
    assert build_report(table_of(SCORES), tmp_path, dataset=rows).numbers["images"] == {"shown": 6}


def test_long_captions_are_cut_off_on_the_page_only():
    rows = read_rows(
        table_of(SCORES), images_of(LABELS, captions=["x" * 1000, None, "", "d", "e", "f"]), ReportOptions()
    )
    data = page_data({"cut": {"value": 0.0}}, rows, np.arange(6), make_thumbnails(rows.dataset, np.arange(0)))
    assert [len(text) for text in data["captions"]] == [300, 0, 0, 1, 1, 1]
    assert data["longest_caption"] == 300
    assert rows.text_lengths.tolist() == [1000, 0, 0, 1, 1, 1]


def test_captions_of_many_bytes_are_cut_off_earlier():
    assert shortened(["abc", "d"]) == (["abc", "d"], None)
    found, limit = shortened(["日" * 200] * 100, most=30_000)
    assert limit == 94
    assert found == ["日" * 93 + "…"] * 100
    assert sum(len(text.encode()) for text in found) <= 30_000


# ---- health --------------------------------------------------------------------------------------------------------


def test_health_of_a_checkpoint(tmp_path):
    for step in (5, 20, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    state = {"health": {"fit": 0.2, "fit_seen": 999.0, "trust": -0.3, "trust_seen": 999.0}}
    for step in (5, 20):
        (tmp_path / f"checkpoint-{step}/mimic_state.json").write_text(json.dumps(state))
    assert last_checkpoint(tmp_path / "scores").name == "checkpoint-20"
    found = health_numbers({}, read_health(tmp_path / "checkpoint-20"))
    assert found["run"]["score_trust_correlation"] == pytest.approx(-0.3)
    assert found["verdict"].startswith("The run found the score uninformative or turned around")
    log = {"log_history": [{"step": i, "loss": 1.0, "score_fit_correlation": i / 10} for i in range(5)]}
    (tmp_path / "checkpoint-100/trainer_state.json").write_text(json.dumps(log))
    run = read_health(tmp_path / "checkpoint-100")
    assert (run["score_fit_correlation"], len(run["steps"])) == (0.4, 5)
    with pytest.raises(ValueError, match="which says nothing about a score"):
        read_health(tmp_path / "checkpoint-50")
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(ValueError, match="the health must come from a JSON file"):
        read_health(tmp_path / "x.json")


def test_health_by_the_table():
    score = np.random.default_rng(0).normal(size=100)
    found = health_numbers({"mimic_score": score, "loss": -score, "ref_trust": -score}, None)
    assert found["table"]["score_fit_rank_correlation"] == pytest.approx(1)
    assert found["table"]["score_trust_rank_correlation"] == pytest.approx(-1)
    assert found["verdict"] == "The run gave no verdict."


# ---- the command ---------------------------------------------------------------------------------------------------


@pytest.fixture
def home(tmp_path):
    """Return a folder with `rows.parquet` and `out/scores`."""
    images_of(LABELS, captions=["a"] * 6).to_parquet(tmp_path / "rows.parquet")
    table = ScoreTable(tmp_path / "out/scores")
    table.extend(table_of(SCORES, epochs=2, relative_weight=np.exp(SCORES)))
    table.flush()
    return tmp_path


def test_command(home, capsys):
    flags = ["--scores", str(home / "out/scores"), "--dataset", str(home / "rows.parquet")]
    (home / "q.json").write_text('{"a": {"retained": 0.5}}')
    flags += ["--compare", str(home / "q.json"), "--space", "--output_dir", str(home / "report")]
    assert main(["report", *flags]) == 0
    printed = capsys.readouterr().out
    assert "mimic_score >= 0 keeps 4 (66.7%)" in printed
    assert str(home / "report/report.html") in printed
    numbers = json.loads((home / "report/report.json").read_text(encoding="utf-8"))
    names = ["threshold 1/b", "two means", "mixture", "mimic_score >= 0", "ensemble"]
    assert numbers["agreement"]["filters"] == names
    assert numbers["title"] == "Scores of rows.parquet"
    assert numbers["compare"] == {"a": {"retained": 0.5}}
    assert (home / "report/README.md").is_file()


def test_command_on_what_filter_wrote(home, capsys):
    rows, output = str(home / "rows.parquet"), str(home / "all.parquet")
    flags = ["--dataset", rows, "--scores", str(home / "out/scores"), "--min_score", "0.15", "--keep_all"]
    assert main(["filter", *flags, "--output", output]) == 0
    assert main(["report", "--dataset", output, "--output_dir", str(home / "r")]) == 0
    numbers = json.loads((home / "r/report.json").read_text(encoding="utf-8"))
    assert numbers["agreement"]["filters"] == ["keep"]
    assert numbers["agreement"]["kept"][0]["kept"] == 3
    assert len(load_rows(output)) == 6


def test_a_filter_of_ones_own_in_a_column(home):
    """Decisions go with the ids, whatever the order of the rows; what has none is kept."""
    rows = images_of(LABELS).add_column("mine", [None, False, True, True, False, True]).select([5, 1, 0, 4, 3, 2])
    rows.to_parquet(home / "mine.parquet")
    flags = ["--dataset", str(home / "mine.parquet"), "--keep_column", "mine", "--output_dir", str(home / "r")]
    assert main(["report", "--scores", str(home / "out/scores"), *flags]) == 0
    found = json.loads((home / "r/report.json").read_text(encoding="utf-8"))["agreement"]
    ours, mine = SCORES >= 0, np.array([True, False, True, True, False, True])
    assert found["filters"][-1] == "mine"
    assert found["equal"][-1][found["filters"].index("mimic_score >= 0")] == pytest.approx((ours == mine).mean())


def test_values_that_are_not_finite_count_as_none(tmp_path):
    rows = images_of(LABELS).add_column("mimic_score", [float("-inf"), 0.1, NAN, None, float("inf"), 0.3])
    report = build_report(None, tmp_path, dataset=rows)
    assert report.numbers["summary"]["scored"] == 2
    assert unpacked(block(page_of(report))["ids"], "<i8")[:2].tolist() == [1, 5]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "--scores or a --dataset with score columns must be given, got neither"),
        (["--scores", "{}/no"], "must hold the score shards"),
        (["--scores", "{}/out/scores", "--keep_column", "mine"], "must have the column 'mine', got no data set"),
        (["--scores", "{}/out/scores", "--compare", "{}/rows.parquet"], "--compare must be a JSON file"),
        (["--scores", "{}/out/scores", "--features", "{}/rows.parquet"], "--features must be a .npy file"),
        (["--scores", "{}/out/scores", "--health", "{}/no"], "which says nothing about a score"),
        (["--dataset", "{}/rows.parquet"], "the data set must have a score column"),
    ],
)
def test_bad_flags(home, capsys, flags, message):
    assert main(["report", *[flag.format(home) for flag in flags], "--output_dir", str(home / "r")]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (home / "r").exists()


def test_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"must have matplotlib, got: .*pip install 'hf_mimic\[report\]'"):
        build_report(table_of(SCORES), tmp_path)


def test_a_name_that_no_font_has():
    from hf_mimic.report_figures import plain as shown

    assert shown("猫\ncat $x$ \\frac") == "? cat $x$ \\frac"
    assert shown("a" * 50) == "a" * 23 + "…"


def test_names_like_formulas_are_drawn(tmp_path, monkeypatch):
    monkeypatch.undo()
    kind = ClassLabel(names=["$\\frac{", "猫", "_&<"])
    report = build_report(
        table_of(SCORES, epochs=2), tmp_path, dataset=images_of(LABELS, kind=kind, captions=["$a$"] * 6)
    )
    assert len(report.figures) == 12
