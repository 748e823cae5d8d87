"""The page as a parser reads it: complete, harmless, small, and there whatever is missing."""

from __future__ import annotations

import json
import math
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from iou_d2.analysis.average_precision import coco_precision, summarize_ap
from iou_d2.report import LARGEST_PAGE, Curve, Expected, Subject, write_page
from iou_d2.report.gallery import choose, image_facts
from iou_d2.report.markup import embedded_json, escape, number, table
from iou_d2.report.measures import measure
from iou_d2.report.thumbnails import Thumbnails
from random_coco import make_random_coco

SECTIONS = "what metrics training curves classes scores errors confusion images repeat".split()
VOID = {"meta", "br", "img", "link", "input"}


class Page(HTMLParser):
    """Checks that elements nest, and collects ids, text, and the data of the script."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.ids, self.tags, self.words, self.addresses = [], [], [], [], []
        self.data = None
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append(tag)
        if "id" in attributes:
            assert attributes["id"] not in self.ids
            self.ids.append(attributes["id"])
        self.addresses += [attributes[key] for key in ("src", "href") if key in attributes]
        if tag not in VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, text):
        if self.open and self.open[-1] == ("script", "data"):
            self.data = json.loads(text, parse_constant=pytest.fail)
        elif self.open and self.open[-1][0] not in ("script", "style"):
            self.words.append(text)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def make_subject(folder=None, seed=0, classes=3, name="a run", **more) -> Subject:
    truth, results = make_random_coco(seed, images=12, classes=classes)
    if folder is not None:
        for image in truth["images"][:-1]:  # the last one is missing
            noise = np.random.default_rng(image["id"]).integers(0, 255, (500, 500, 3), np.uint8)
            Image.fromarray(noise).save(folder / image["file_name"])
    arguments = {
        "facts": {"config": "quick/x"},
        "losses": {"total_loss": Curve(np.array([20, 40]), np.array([2.0, math.nan]))},
        "ap": Curve(np.array([20, 40]), np.array([1.0, 2.0])),
        "speed": {"training": "1 s"},
        "commands": ["iou-d2 train"],
    }
    return Subject(name, truth, results, folder, **{**arguments, **more})


def read(*subjects, **arguments) -> Page:
    return Page(write_page(subjects, "title", **{"draws": 20, **arguments}))


def test_a_page_has_all_sections_and_needs_nothing_else(tmp_path):
    subject = make_subject(tmp_path)
    page = read(subject)
    assert set(SECTIONS) <= set(page.ids)
    assert all(address.startswith("#") for address in page.addresses)
    assert page.tags.count("figure") == len(page.data["charts"]) > 8
    metrics = summarize_ap(coco_precision(subject.truth, subject.results), [])
    for key in ("AP", "AP50", "AP75", "APs"):
        assert f"{metrics[key]:.1f}" in page.text
    # NaN in a curve is a gap; the page holds no NaN, which is no JSON.
    losses = next(chart for chart in page.data["charts"] if chart["title"] == "total_loss")
    assert losses["series"][0]["points"] == [[20, 2.0], [40, None]]


def test_the_gallery_shows_boxes_and_says_which_image_is_missing(tmp_path):
    page = read(make_subject(tmp_path))
    (gallery,) = page.data["galleries"]
    assert set(gallery["lists"]) == {"best", "worst", "wrong"}
    images = {image["name"]: image for image in gallery["images"]}
    assert images["0.jpg"]["picture"] >= 0 and images["0.jpg"]["why"] == ""
    assert (
        images["11.jpg"]["picture"] == -1 and images["11.jpg"]["why"] == "The image is not there."
    )
    assert "1 image is not there, such as 11.jpg" in page.text
    assert all(uri.startswith("data:image/jpeg;base64,") for uri in page.data["thumbnails"])
    qualities = [gallery["images"][n]["quality"] for n in gallery["lists"]["best"]]
    assert qualities == sorted(qualities, reverse=True)
    wrong = [gallery["images"][n]["wrong"] for n in gallery["lists"]["wrong"]]
    assert wrong == sorted(wrong, reverse=True)


def test_the_quality_of_an_image_by_hand():
    """Of three objects and three detections one pair, with IoU 80 / 120."""

    def record(x, **more):
        return {"image_id": 1, "category_id": 1, "bbox": [x, 0, 100, 10], **more}

    truth = {
        "images": [{"id": 1, "file_name": "a.png"}, {"id": 2, "file_name": "b.png"}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [record(0), record(500), record(1000)],
    }
    results = [record(20, score=0.9), record(300, score=0.95), record(700, score=0.91)]
    measures = measure(Subject("x", truth, results))
    facts = image_facts(measures)
    assert measures.score == 0.9
    assert facts[0].quality == pytest.approx((80 / 120) / (1 + 2 / 2 + 2 / 2))
    assert math.isnan(facts[1].quality) and facts[1].wrong == -1
    assert facts[0].wrong == 1
    assert choose(facts, measures, 20) == {"best": [0], "worst": [0], "wrong": [0]}


def test_objects_on_the_edge_of_two_sizes_are_of_both():
    """As COCO counts APs, APm and APl of them."""
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 400, "height": 400}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [
            {"image_id": 1, "category_id": 1, "bbox": [0, 0, side, side]} for side in (32, 96, 97)
        ],
    }
    results = [{**annotation, "score": 0.9} for annotation in truth["annotations"]]
    measures = measure(Subject("x", truth, results))
    assert measures.sizes == {"small": 1, "medium": 2, "large": 2}
    alone = {**truth, "annotations": truth["annotations"][:1]}
    table = measure(Subject("x", alone, results)).table
    assert table["APs"] == table["APm"] == pytest.approx(100) and math.isnan(table["APl"])


def test_a_thin_image_has_a_height():
    truth = {
        "images": [{"id": 1, "file_name": "a.png", "width": 100_000, "height": 10}],
        "categories": [{"id": 1, "name": "a"}],
        "annotations": [{"image_id": 1, "category_id": 1, "bbox": [10, 1, 30, 5]}],
    }
    results = [{**truth["annotations"][0], "score": 0.9}]
    (gallery,) = read(Subject("x", truth, results)).data["galleries"]
    width, height = gallery["images"][0]["size"]
    assert width > 100 and height >= 1


def test_names_are_harmless():
    evil = '</script><script>alert(1)</script><img src=x onerror="alert(2)">&\udc80'
    subject = make_subject(name=evil, notes=[evil], commands=[evil], facts={evil: evil})
    for thing in (*subject.truth["images"], *subject.truth["categories"]):
        thing["file_name"] = thing["name"] = f"{thing['id']}{evil}"
    text = write_page([subject], evil)
    text.encode()
    page = Page(text)
    assert page.tags.count("script") == 2 and "img" not in page.tags
    assert page.data["galleries"][0]["images"][0]["name"].endswith(evil)
    assert page.data["galleries"][0]["classes"][0] == f"1{evil}"


def test_runs_side_by_side_are_tested_on_the_same_images_only():
    first, other = make_subject(name="first"), make_subject(name="other", seed=1)
    again = make_subject(name="again")
    page = read(first, again, other)
    assert "Compared with first" in page.text
    assert "other is not on the same images and objects, and so is not tested." in page.text
    assert page.tags.count("table") > 8 and "95 % interval" in page.text
    assert [gallery["name"] for gallery in page.data["galleries"]] == ["first", "again", "other"]


def test_expected_results_are_held_against_what_is_counted():
    expected = [Expected("bbox", "AP50", 0, 100), Expected("bbox", "AP", 99, 1)]
    page = read(make_subject(expected=expected, recorded={"bbox/AP": 99.0, "voc/AP50": 12.34}))
    assert "0 ± 100 met" in " ".join(page.text.split())
    assert "99 ± 1 not met" in " ".join(page.text.split())
    assert "The run recorded AP 99.00, but its results file gives" in page.text
    assert "12.3" in page.text


def test_a_correlation_is_no_percentage():
    expected = [Expected("localization", "pearson_x", 0.73, 0.1)]
    page = read(make_subject(expected=expected, recorded={"localization/pearson_x": 0.7269}))
    assert "0.727 0.73 ± 0.1 met" in " ".join(page.text.split())


def test_what_is_missing_is_said():
    assert "There is no detection" in read(make_subject_with(results=[])).text
    assert "The ground truth has no objects" in read(make_subject_with(annotations=[])).text
    bare = Subject("bare", recorded={"bbox/AP": 12.3, "bbox/AP50": None}, notes=["No results."])
    page = read(bare)
    assert "12.3" in page.text and "–" in page.text and "No results." in page.text
    assert page.data["galleries"] == []
    nothing = Subject("n", {"images": [], "categories": [], "annotations": []}, [])
    assert "nan" not in read(nothing).text.lower()
    with pytest.raises(ValueError, match="at least one detector"):
        write_page([], "title")


def make_subject_with(annotations=None, results=None) -> Subject:
    subject = make_subject()
    truth = subject.truth if annotations is None else {**subject.truth, "annotations": annotations}
    return Subject("x", truth, subject.results if results is None else results)


def test_scores_that_are_no_probabilities_have_no_diagram():
    subject = make_subject()
    results = [{**result, "score": 9 * result["score"] - 4} for result in subject.results]
    page = read(Subject("logits", subject.truth, results))
    assert "not in 0 to 1" in page.text
    assert not any("Reliability" in chart["title"] for chart in page.data["charts"])


def test_a_predicted_iou_has_a_diagram_of_its_own():
    subject = make_subject()
    results = [{**r, "pred_iou": 0.5, "cls_score": r["score"] / 2} for r in subject.results]
    titles = [c["title"] for c in read(Subject("x", subject.truth, results)).data["charts"]]
    signals = ("score", "class score", "predicted IoU")
    assert [t for t in titles if "Reliability" in t] == [f"Reliability of the {s}" for s in signals]


def test_many_classes_and_runs_share_their_pictures(tmp_path):
    subjects = [make_subject(tmp_path, classes=80, name=f"run {n}") for n in range(4)]
    text = write_page(subjects, "many", draws=1)
    assert len(text.encode()) <= LARGEST_PAGE
    page = Page(text)
    assert 5 < len(page.data["thumbnails"]) <= 11 < len(page.data["galleries"][0]["images"]) * 4
    assert "The 24 classes with most errors, of 80." in page.text


def test_a_page_that_would_be_too_large_has_fewer_pictures(tmp_path, monkeypatch):
    subject = make_subject(tmp_path)
    whole = len(write_page([subject], "title").encode())
    monkeypatch.setattr("iou_d2.report.page.LARGEST_PAGE", whole - 1)
    text = write_page([subject], "title")
    assert len(text.encode()) < whole
    assert 0 < len(Page(text).data["galleries"][0]["images"]) < 12


def test_pictures_shrink_to_their_share_of_the_page(tmp_path):
    noise = np.random.default_rng(0).integers(0, 255, (900, 600, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"no image")
    sizes = [len(Thumbnails(n).take(tmp_path / "a.png")[1]) for n in (10**6, 10)]
    assert sizes[0] == 0 < sizes[1]  # the second says that the picture is too large
    for largest in (100_000, 40_000, 8_000):
        thumbnails = Thumbnails(largest)
        assert thumbnails.take(tmp_path / "a.png") == (0, "", (600, 900))
        assert thumbnails.take(tmp_path / "a.png")[0] == 0
        assert 0 < len(thumbnails.data[0]) <= largest
    assert "b.png cannot be read as an image" in thumbnails.take(tmp_path / "b.png")[1]
    assert thumbnails.broken == {str(tmp_path / "b.png")}


def test_numbers_and_tables():
    assert [number(x) for x in (None, math.nan, math.inf, 1.25, -2)] == [
        "–",
        "–",
        "–",
        "1.2",
        "−2.0",
    ]
    assert number(0.5, 2, sign=True) == "+0.50"
    assert escape("<a&\"'>") == "&lt;a&amp;&quot;&#x27;&gt;"
    assert "&lt;b&gt;" in table(["h"], [["x", "<b>"]], "label")
    assert json.loads(embedded_json({"a": [math.nan, "</script>"]})) == {"a": [None, "</script>"]}
    assert "<" not in embedded_json(["</script>"])
