"""The page in a browser, where there is one: the script runs without an error and draws."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import pytest

from iou_d2.report import Subject, write_page
from random_coco import make_random_coco

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome", "chrome-headless-shell")
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)


@pytest.mark.skipif(BROWSER is None, reason=f"none of {', '.join(NAMES)} is installed")
def test_the_script_draws_every_chart_and_the_images(tmp_path):
    truth, results = make_random_coco(0, images=12, classes=3)
    subjects = [Subject(name, truth, results) for name in ("<b>one</b>", "two")]
    file = tmp_path / "report.html"
    file.write_text(write_page(subjects, "title", draws=5))
    done = subprocess.run(
        [
            *(BROWSER, "--headless=new", "--no-sandbox", "--disable-gpu", "--dump-dom"),
            *("--enable-logging=stderr", "--virtual-time-budget=3000", "--window-size=1200,900"),
            *(f"--user-data-dir={tmp_path / 'profile'}", file.as_uri()),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )
    page = done.stdout
    if 'id="data"' not in page:
        pytest.skip(f"{BROWSER} opens no file of {tmp_path}")  # as one from a snap
    assert ":CONSOLE" not in done.stderr, done.stderr
    figures = re.findall(r"<figure.*?</figure>", page, re.DOTALL)
    assert len(figures) > 8
    assert all(re.search(r'<svg[^>]*role="img"[^>]*aria-label="[^"]+', f) for f in figures)
    listed = json.loads(file.read_text().split('id="data">')[1].split("</script>")[0])
    assert page.count('<article class="card">') == len(listed["galleries"][0]["lists"]["worst"]) > 5
    assert "NaN" not in page.split('id="data"')[0]
    assert "&lt;b&gt;one&lt;/b&gt;" in page and "<b>one</b>" not in page.split('id="data"')[0]
