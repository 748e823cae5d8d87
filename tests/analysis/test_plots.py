"""plots.py: what the pictures say, that they are drawn, and the command that writes them."""

import json
import re

import numpy as np
import pytest

from iou_d2.analysis import make_records
from iou_d2.analysis.plots import (
    plot_ap_by_iou,
    plot_bars,
    plot_curves,
    plot_panels,
    plot_score_vs_iou,
)
from iou_d2.commands import analyze as analyze
from iou_d2.errors import InputError, MissingFileError


def planted(shift_of_score=lambda iou: iou, count=30):
    """Ground truth 100 wide, detections shifted sideways; the confidence follows the IoU."""
    truth = {
        "images": [
            {"id": i, "file_name": f"{i}.png", "width": 200, "height": 200} for i in range(count)
        ],
        "categories": [{"id": 0, "name": "thing"}],
        "annotations": [
            {"id": i, "image_id": i, "category_id": 0, "bbox": [0, 0, 100, 100]}
            for i in range(count)
        ],
    }
    results = []
    for i in range(count):
        iou = (100 - i) / (100 + i)
        results.append(
            {
                "image_id": i,
                "category_id": 0,
                "bbox": [i, 0, 100, 100],
                "score": shift_of_score(iou),
                "cls_score": 1 - iou,
                "pred_iou": iou**2,
            }
        )
    return truth, results


def test_titles_hold_the_correlations(tmp_path):
    figure = plot_score_vs_iou(make_records(*planted()), tmp_path / "scatter.png")
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[0] == "class score: r = -1.000 (rho = -1.000)"
    assert titles[1] == "confidence: r = 1.000 (rho = 1.000)"
    assert titles[2].startswith("predicted IoU: r = 0.99")
    points = figure.axes[1].collections[0].get_offsets()
    assert len(points) == 30 and np.allclose(points[:, 0], points[:, 1])
    assert (tmp_path / "scatter.png").read_bytes()[:4] == b"\x89PNG"


def test_plots_of_nothing_and_of_many(tmp_path):
    truth, results = planted()
    figure = plot_score_vs_iou(make_records(truth, []), tmp_path / "none.png")
    assert [axes.get_title() for axes in figure.axes] == [
        "class score: r = nan (rho = nan)",
        "confidence: r = nan (rho = nan)",
    ]
    figure = plot_score_vs_iou(make_records(truth, results * 1001), tmp_path / "many.png")
    assert 10_000 < len(figure.axes[0].collections[0].get_offsets()) <= 20_000
    plot_ap_by_iou(np.arange(10) / 20 + 0.5, np.full(10, np.nan), tmp_path / "nan.png")
    assert (tmp_path / "none.png").exists() and (tmp_path / "nan.png").exists()


def test_scores_outside_of_0_to_1_are_in_the_picture(tmp_path):
    inside = plot_score_vs_iou(make_records(*planted()), tmp_path / "scatter.png")
    assert inside.axes[1].get_ylim() == (0, 1.02)
    truth, results = planted(lambda iou: 9 * iou - 6)
    figure = plot_score_vs_iou(make_records(truth, results), tmp_path / "scatter.png")
    scores = figure.axes[1].collections[0].get_offsets()[:, 1]
    low, high = figure.axes[1].get_ylim()
    assert scores.max() == 3 and low <= scores.min() < 0 and 3 < high < 3.2


NAMES = ["plain", "_under", "lr$a_$", r"lr$\q$", "a$b"]


@pytest.mark.parametrize("draw", ["curves", "panels", "bars"])
def test_a_legend_shows_names_as_they_are(tmp_path, draw):
    curves = {name: (np.arange(2), np.arange(2)) for name in NAMES}
    path = tmp_path / "a.png"
    if draw == "curves":
        figure = plot_curves(curves, path, x_label="x", y_label="y")
    elif draw == "panels":
        figure = plot_panels({"y": curves}, path, x_label="x")
    else:
        bars = dict.fromkeys(NAMES, 1.0)
        figure = plot_bars(dict.fromkeys(NAMES, bars), path, y_label="y", title=NAMES[-2])
    shown = figure.axes[0].get_legend().get_texts()
    if draw == "bars":
        shown = [*shown, *figure.axes[0].get_xticklabels()]
    # What is drawn: matplotlib takes dollars with a backslash for plain ones.
    words = [text._preprocess_math(text.get_text()) for text in shown]
    assert words == [(name, False) for name in NAMES] * (2 if draw == "bars" else 1)


def test_bars_have_their_values_and_gaps(tmp_path):
    groups = {"nothing": {"a": 41.26, "b": 42.0}, "boxes": {"b": 60.0}, "classes": {"a": np.nan}}
    figure = plot_bars(groups, tmp_path / "bars.png", y_label="AP")
    (axes,) = figure.axes
    first, second = axes.containers
    assert [bar.get_height() for bar in second][:2] == [42, 60] and first[0].get_height() == 41.26
    assert first[0].get_x() + first[0].get_width() == pytest.approx(second[0].get_x())
    assert [text.get_text() for text in axes.texts] == ["41.3", "", "", "42.0", "60.0", ""]
    assert [text.get_text() for text in axes.get_xticklabels()] == list(groups)
    plot_bars({}, tmp_path / "none.png", y_label="AP")
    assert (tmp_path / "bars.png").read_bytes()[:4] == b"\x89PNG"


def test_analyze_command(tmp_path, capsys):
    truth, results = planted()
    gt_path, results_path = tmp_path / "gt.json", tmp_path / "results.json"
    gt_path.write_text(json.dumps(truth))
    results_path.write_text(json.dumps(results))
    arguments = ["--gt", str(gt_path), "--results", str(results_path), "--output"]
    analyze.main([*arguments, str(tmp_path / "a" / "b")])
    printed = capsys.readouterr().out
    assert "| AP50     | 100.00 |" in printed
    assert "| pearson_confidence  | 1  " in printed
    assert "| detections          | 30 " in printed
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == {
        "score_vs_iou.png",
        "ap_by_iou.png",
    }

    results_path.write_text("[{")
    with pytest.raises(InputError, match=r"results\.json is not valid JSON"):
        analyze.main([*arguments, str(tmp_path)])
    results_path.unlink()
    with pytest.raises(MissingFileError, match=r"There is no .*results\.json"):
        analyze.main([*arguments, str(tmp_path)])


def test_without_classes_a_wrong_class_is_no_error_and_the_better_of_two_boxes_stays(
    tmp_path, capsys
):
    truth = {
        "images": [{"id": 3, "file_name": "a.png", "width": 99, "height": 99}],
        "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 3, "category_id": 3, "bbox": [0, 0, 10, 10]}],
    }
    results = [
        {"image_id": 3, "category_id": 5, "bbox": [0, 0, 10, 10], "score": 0.9},
        {"image_id": 3, "category_id": 3, "bbox": [0, 0, 10, 7], "score": 0.8},
    ]
    merged, found = analyze.merge_classes(truth, results)
    assert [x["name"] for x in merged["categories"]] == ["object"]
    assert found == [{**results[0], "category_id": 1}]
    assert analyze.merge_classes(truth, []) == (merged, [])

    gt_path, results_path = tmp_path / "gt.json", tmp_path / "results.json"
    gt_path.write_text(json.dumps(truth))
    results_path.write_text(json.dumps(results))
    arguments = ["--gt", str(gt_path), "--results", str(results_path), "--output", str(tmp_path)]
    analyze.main(arguments)
    assert re.search(r"\| AP90 +\| +0.00 \|", capsys.readouterr().out)
    analyze.main([*arguments, "--class-agnostic"])
    assert re.search(r"\| AP90 +\| +100.00 \|", capsys.readouterr().out)
