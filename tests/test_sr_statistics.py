"""
Best, mean and worst of M seeds, thirds by degradation strength, and the plumbing of optional metrics.

Run     python -m pytest tests/test_sr_statistics.py        # 5 s
"""
import importlib.metadata
import io
import itertools
import sys
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from common import iqa, metrics, sr_report, sr_statistics
from conftest import load_stage, make_images

CPU = torch.device("cpu")
NAMES = list(load_stage("05").METRICS)


def samples(n: int = 9, variants: int = 3, m: int = 5) -> np.ndarray:
    rng = np.random.default_rng(0)
    return rng.normal(size=(n, variants, m, len(NAMES))) + np.arange(variants)[:, None, None]


def test_best_mean_worst_are_means_over_all_subsets_of_seeds():
    values = np.random.default_rng(1).normal(size=(4, 6))
    found = sr_statistics.of_draws(values)
    for row, m in itertools.product(range(4), range(1, 7)):
        subsets = [np.array(own) for own in itertools.combinations(values[row], m)]
        for kind, of in (("best", np.max), ("mean", np.mean), ("worst", np.min)):
            assert found[kind][row, m - 1] == pytest.approx(np.mean([of(own) for own in subsets]))


def test_draws_report_means_and_paired_gains_over_base():
    values = samples()
    found = sr_statistics.by_draws(values, ["base", "tuned", "hybrid"], NAMES, 0)
    assert set(found) == set(sr_statistics.DRAWN)
    k = NAMES.index("psnr")
    best = values[..., k].max(2)                                                # of all five
    assert found["psnr"]["best"]["tuned"][4] == pytest.approx(best[:, 1].mean(), abs=1e-4)
    gain = found["psnr"]["best"]["hybrid_gain"][4]
    assert gain["gain"] == pytest.approx((best[:, 2] - best[:, 0]).mean(), abs=1e-4)
    assert gain["ci95"] == pytest.approx(metrics.bootstrap_ci(best[:, 2] - best[:, 0], 0), abs=1e-4)
    picture = Image.open(io.BytesIO(sr_statistics.plot_draws(found, {"psnr": "PSNR"}, ["base", "tuned", "hybrid"])))
    assert picture.width > 300


def test_thirds_by_strength_are_ordered_and_complete():
    values, strength = samples()[:, :2].mean(2), np.array([20, 30, 25, 35, 22, 31, 40, 28, 24.0])
    found = sr_statistics.by_strength(strength, values, ["base", "tuned"], NAMES, 0)
    assert [one["strength"] for one in found] == ["mild", "middle", "strong"]
    assert [one["lr_psnr_of_hr"] for one in found] == [[31, 40], [25, 30], [20, 24]]
    rows = [1, 2, 7]                                                            # 30, 25 and 28 dB
    assert found[1]["mean"]["tuned"]["psnr"] == pytest.approx(values[rows, 1, NAMES.index("psnr")].mean(), abs=1e-4)
    gain = found[1]["gain"]["tuned"]["psnr"]["gain"]
    assert gain == pytest.approx((values[rows, 1] - values[rows, 0])[:, NAMES.index("psnr")].mean(), abs=1e-4)
    few = sr_statistics.by_strength(strength[:2], values[:2], ["base", "tuned"], NAMES, 0)
    assert [one["images"] for one in few] == [1, 1] and few[0]["gain"]["tuned"]["psnr"]["ci95"] is None
    names = load_stage("05").METRICS
    assert len(sr_report.strength_rows({"by_strength": few}, names)) == 5


# pyiqa: the plumbing alone, with a made-up module; the package itself was never run here --------------------

@pytest.fixture
def fake_pyiqa(monkeypatch):
    table = {"sharp": {"metric_opts": {"type": "Sharp", "pretrained": "koniq10k"}, "metric_mode": "NR"},
             "far": {"metric_opts": {"type": "Far"}, "metric_mode": "FR", "lower_better": True}}

    def create_metric(name, device):
        def model(image, hr=None):
            return image.std()[None] if hr is None else (image - hr).abs().mean()[None]
        model.metric_mode, model.lower_better = table[name]["metric_mode"], table[name].get("lower_better", False)
        return model
    package, tables = ModuleType("pyiqa"), ModuleType("pyiqa.default_model_configs")
    package.create_metric, tables.DEFAULT_CONFIGS = create_metric, table
    monkeypatch.setitem(sys.modules, "pyiqa", package)
    monkeypatch.setitem(sys.modules, "pyiqa.default_model_configs", tables)
    monkeypatch.setattr(importlib.metadata, "version", lambda name: "0.0")
    return SimpleNamespace(table=table)


def test_optional_metrics_are_called_and_named_with_their_weights(fake_pyiqa, capsys):
    measures = iqa.load(["sharp", "far"], CPU)
    _, image, hr, _ = make_images(0)
    sharp, far = iqa.measure(measures, image, hr, CPU)
    assert sharp == pytest.approx(np.std(image / 255, ddof=1), abs=1e-4)
    assert far == pytest.approx(np.abs(image / 255 - hr / 255).mean(), abs=1e-4)
    about = {name: text for name, (_, text) in iqa.describe(measures).items()}
    assert "pretrained=koniq10k" in about["sharp"] and "pyiqa 0.0" in about["sharp"]
    assert about["far"].startswith("lower is better, against the ground truth")
    with pytest.raises(SystemExit):
        iqa.load(["shrap"], CPU)
    assert "no metric 'shrap'" in capsys.readouterr().err


def test_without_pyiqa_nothing_is_imported_unless_asked(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pyiqa", None)                             # import fails
    assert iqa.load([], CPU) == [] and iqa.measure([], *make_images(0)[:2], CPU) == []
    with pytest.raises(SystemExit):
        iqa.load(["musiq"], CPU)
    error = capsys.readouterr().err
    assert "pyiqa_metrics" in error and "install pyiqa" in error and error.count("\n") == 1
