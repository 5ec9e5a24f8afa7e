"""
Pages that open anywhere, and curves.png.

Run     python -m pytest tests/test_report.py       # 3 s, and a toy run of 01 and 02 if there is none yet
"""
import base64
import io
import json
import re

import numpy as np
from PIL import Image

from common import report

EVIL = '<script src="http://x">&'


def test_a_page_needs_nothing_else_and_shows_names_as_text():
    image = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    page = report.page(EVIL, [
        report.row({EVIL: image}, {EVIL: "0.5"}), report.compare(image, image, (EVIL, "after")),
        report.table([["method", "score"], [EVIL, "1"], ["ours", "2"]], "ours"), report.cards([(EVIL, EVIL, EVIL)]),
        report.text([EVIL, f"## {EVIL}", [["a", "b"], [EVIL, "2"]]])])
    assert page.count("<script") == 0 and page.count("&lt;script") == 12
    assert not re.search(r'(src|href)="(?!data:image/png;base64,)', page)
    sources = re.findall(r'src="data:image/png;base64,([^"]*)"', page)
    assert len(sources) == 3
    for source in sources:
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))), image)
    assert '<tr class="mine"><td>ours</td><td>2</td></tr>' in page
    assert "<h3>" in page and "<tr><th>a</th><th>b</th></tr>" in page


def test_series_are_the_numbers_that_change_evaluations_first(tmp_path):
    rows = [{"step": 0, "time": 9.5, "a": 1.0, "same": 3, "phase": "x"}, {"step": 1, "a": None, "val_b": 5},
            {"step": 2, "val_b": 6}, {"step": 3, "a": 4, "same": 3}]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    series = report.read_series(tmp_path / "metrics.jsonl")
    points = {key: values.tolist() for key, values in series.items()}
    assert points == {"val_b": [[1, 2], [5, 6]], "a": [[0, 3], [1, 4]]}
    assert list(series) == ["val_b", "a"]
    assert list(report.read_series(tmp_path / "metrics.jsonl", ["a", "gone"])) == ["a"]
    assert "<img" in report.curves(tmp_path / "metrics.jsonl", ["a"])
    assert "No curves" in report.curves(tmp_path / "metrics.jsonl", ["gone"])
    assert "No curves" in report.curves(tmp_path / "none.jsonl", ["a"])


def test_curves_of_a_toy_run_are_drawn(toy_run):
    with Image.open(toy_run / "02_train_reward" / "curves.png") as image:
        pixels = np.asarray(image.convert("RGB")).reshape(-1, 3)
    assert (pixels == (31, 119, 180)).all(1).sum() > 500                # lines, not only empty axes
