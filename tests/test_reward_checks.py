"""
Probes, ties, correlations, methods and calibration against hand-made answers and plain loops.

Run     python -m pytest tests/test_reward_checks.py        # 5 s
"""
import itertools

import numpy as np
import pytest
from scipy.stats import kendalltau, pearsonr, spearmanr

from common import calibration, candidates, metrics, pair_stats, probes, reward_checks, reward_report, reward_tables
from common.groups import Labels
from common.images import resize
from common.metrics import AXES
from conftest import make_images


def draw(seed: int, groups: int = 12, count: int = 5) -> tuple[np.ndarray, Labels]:
    """Scores [G, C, 3] with ties, and labels that they resemble."""
    rng = np.random.default_rng(seed)
    truth = rng.random((groups, count, 3)).round(1)
    ranks = np.array([[metrics.ranks(own[:, a].tolist(), 0.15) for a in range(3)] for own in truth], float)
    scores = (1 + 8 * truth + rng.normal(0, 1.5, truth.shape)).round(1)
    return scores, Labels(ranks.transpose(0, 2, 1), truth)


# ties ------------------------------------------------------------------------------------------------------

def slow_accuracy(scores: np.ndarray, ranks: np.ndarray, gap: float) -> float:
    right = total = 0
    for s, r in zip(scores, ranks):
        for i, j in itertools.combinations(range(len(s)), 2):
            judged = 0 if abs(s[i] - s[j]) <= gap else np.sign(s[i] - s[j])
            right += judged == np.sign(r[j] - r[i])
            total += 1
    return right / total


def test_accuracy_with_ties_and_the_best_gap_agree_with_loops():
    for seed in range(4):
        scores, labels = draw(seed)
        s, r = scores[..., 2], labels.ranks[..., 2]
        for gap in (0.0, 0.35, 1.05):
            found = pair_stats.accuracy_with_ties(s, r, gap, 0)
            assert found["value"] == pytest.approx(slow_accuracy(s, r, gap), abs=1e-4) and found["pairs"] == 120
        tried = {0.0, *(abs(a - b) for own in s for a, b in itertools.combinations(own, 2))}
        best = max(slow_accuracy(s, r, gap) for gap in tried)
        assert slow_accuracy(s, r, pair_stats.best_tie_gap(s, r)) == pytest.approx(best)


def test_a_judge_that_ties_what_the_labels_tie_is_right():
    ranks = np.array([[1.0, 1, 2, 3]] * 2)
    scores = np.array([[8.0, 7.8, 5, 2]] * 2)
    assert pair_stats.best_tie_gap(scores, ranks) == pytest.approx(0.2)
    assert pair_stats.accuracy_with_ties(scores, ranks, 0.21, 0)["value"] == 1
    assert pair_stats.accuracy_with_ties(scores, ranks, 0, 0)["value"] == pytest.approx(5 / 6, abs=1e-4)
    assert pair_stats.accuracy_with_ties(scores, np.full_like(ranks, np.nan), 0, 0)["value"] is None
    assert pair_stats.best_tie_gap(scores, np.full_like(ranks, np.nan)) == 0


# correlations, methods -------------------------------------------------------------------------------------

def test_correlations_are_scipys_means_over_groups():
    scores, labels = draw(1)
    labels.scores[..., 0], labels.ranks[0, :, 1] = np.nan, 1                # ranks only; a group that ties everything
    found = pair_stats.correlations(scores, labels, 0)
    slow = {"srcc": [spearmanr(s, -r).statistic for s, r in zip(scores[..., 2], labels.ranks[..., 2])],
            "krcc": [kendalltau(s, -r).statistic for s, r in zip(scores[..., 2], labels.ranks[..., 2])],
            "plcc": [pearsonr(s, y).statistic for s, y in zip(scores[..., 2], labels.scores[..., 2])]}
    for kind, values in slow.items():
        own = found[kind]["overall"]
        assert own["value"] == pytest.approx(np.mean(values), abs=1e-4)
        assert own["ci95"][0] < own["value"] < own["ci95"][1]
    assert found["plcc"]["consistency"]["value"] is None and found["srcc"]["consistency"]["value"] is not None
    others = [spearmanr(s, -r).statistic for s, r in zip(scores[1:, :, 1], labels.ranks[1:, :, 1])]
    assert found["srcc"]["naturalness"]["value"] == pytest.approx(np.mean(others), abs=1e-4)


def test_accuracy_by_method_counts_the_pairs_in_which_it_takes_part():
    groups = [{"candidates": [{"method": name} for name in ("hr", "warp+blur", "new")]}] * 2
    train = [{"candidates": [{"method": name} for name in ("hr", "warp", "blur+jpeg")]}]
    scores, ranks = np.array([[9.0, 5, 7]] * 2), np.array([[1.0, 2, 3]] * 2)            # the last pair is wrong
    found = pair_stats.accuracy_by_method(groups, scores, ranks, train=train, seed=0)
    rows = {row["method"]: row for row in found["each"]}
    assert {key: row["value"] for key, row in rows.items()} == {"hr": 1.0, "warp": 0.5, "blur": 0.5, "new": 0.5}
    assert [key for key, row in rows.items() if not row["in_training"]] == ["new"]
    assert rows["hr"]["pairs"] == 4 and rows["hr"]["candidates"] == 2
    assert found["held_out"]["pairs"] == 4 and found["held_out"]["value"] == 0.5


def test_within_a_tier_are_the_pairs_of_methods_that_are_about_equally_good():
    rng = np.random.default_rng(5)
    prior = rng.choice([0.1, 0.15, 0.6, 0.9, np.nan], (20, 4))              # NaN: a method that training never showed
    scores, ranks = rng.normal(size=(20, 4)), rng.integers(1, 4, (20, 4)).astype(float)
    ranks[3, 1] = np.nan
    pairs = [(abs(prior[g, b] - prior[g, w]), np.sign(scores[g, b] - scores[g, w]), np.sign(prior[g, b] - prior[g, w]))
             for g in range(20) for b in range(4) for w in range(4)
             if ranks[g, b] < ranks[g, w] and not np.isnan(prior[g, b] + prior[g, w])]
    limit = np.quantile([gap for gap, *_ in pairs], 1 / 3)
    near = np.array([signs for gap, *signs in pairs if gap <= limit])
    found = pair_stats.within_tier(scores, prior, ranks, 0)
    assert found["pairs"] == len(near) and found["prior_gap"] == pytest.approx(limit, abs=1e-4)
    for name, signs in zip(("judge", "method_prior"), near.T):
        assert found[name]["value"] == pytest.approx((1 + signs.mean()) / 2, abs=1e-4)
        assert found[name]["ci95"][0] <= found[name]["value"] <= found[name]["ci95"][1]
    tied = pair_stats.within_tier(scores, prior, np.ones((20, 4)), 0)
    assert tied["pairs"] == 0 and tied["judge"]["value"] is None


# calibration -----------------------------------------------------------------------------------------------

def test_the_calibration_is_monotone_bounded_and_beats_every_line_where_it_was_fitted():
    rng = np.random.default_rng(0)
    scores = rng.uniform(1, 9, 400).round(2)                                 # with equal scores among them
    labels = (1 / (1 + np.exp(5 - scores)) + rng.normal(0, 0.05, 400)).clip(0, 1)
    knots = calibration.fit(scores, labels)
    found = calibration.apply(knots, np.linspace(-50, 50, 1001))
    assert (np.diff(found) >= 0).all() and labels.min() <= found.min() and found.max() <= labels.max()
    assert (np.diff(knots["score"]) > 0).all()
    line = np.polyval(np.polyfit(scores, labels, 1), scores)
    own = calibration.errors(calibration.apply(knots, scores), labels)
    assert own["rmse"] < calibration.errors(line, labels)["rmse"] and own["rmse"] < 0.06
    assert calibration.apply(knots, np.array([[3.0, 5.0]])).shape == (1, 2)


def test_equal_scores_are_given_the_mean_of_their_labels():
    scores, labels = np.array([5.0] * 10 + [6.0]), np.arange(11.0)
    knots = calibration.fit(scores, labels)
    assert knots == {"score": [5.0, 6.0], "label": [4.5, 10.0]}
    order = np.random.default_rng(1).permutation(11)
    assert calibration.fit(scores[order], labels[order]) == knots


def test_calibration_reports_errors_on_the_other_split():
    val, test = draw(2, groups=30), draw(3, groups=30)
    test[1].scores[..., 0] = np.nan
    maps = calibration.calibrate(*val)
    found = calibration.check(maps, *test)
    assert maps["consistency"] and found["consistency"] is None
    assert found["overall"]["fitted_on"] == found["overall"]["tested_on"] == 150
    wanted = test[1].scores[..., 2]
    after = calibration.apply(found["overall"]["knots"], test[0][..., 2])
    assert found["overall"]["after"]["mae"] == pytest.approx(np.abs(after - wanted).mean(), abs=1e-4)
    low, high = val[1].scores[..., 2].min(), val[1].scores[..., 2].max()
    before = low + (test[0][..., 2] - 1) / 8 * (high - low)
    assert found["overall"]["before"]["mae"] == pytest.approx(np.abs(before - wanted).mean(), abs=1e-4)
    few = calibration.calibrate(*draw(2, groups=2))                                      # too few to fit
    assert few["overall"] is None and calibration.check(few, *test)["overall"] is None


# probes ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
def test_every_probe_does_what_its_name_says(size):
    lr, _, hr, _ = make_images(0, 64, 64)
    _, _, other, _ = make_images(1, *size)                                   # imports may mix sizes
    images = dict(zip(candidates.PROBES, candidates.tamper(hr, lr, other, np.random.default_rng(0)), strict=True))
    assert all(image.shape == hr.shape and image.dtype == np.uint8 for image in images.values())
    inside = np.s_[16:48, 16:48]
    assert (images["swapped"][:16] == hr[:16]).all() and (images["swapped"][inside] != hr[inside]).mean() > 0.9
    spread = {key: np.abs(np.diff(image.astype(float), axis=0)).mean() for key, image in {**images, "hr": hr}.items()}
    assert min(spread["oversharpened"], spread["noisy"], spread["texture"]) > 1.1 * spread["hr"] > spread["bicubic"]
    mean = images["color"].mean((0, 1)) / hr.mean((0, 1))
    assert mean[0] > 1.05 and mean[1] == pytest.approx(1, abs=0.01) and mean[2] < 0.9
    assert (images["bicubic"] == resize(lr, (64, 64), "bicubic")).all()
    again = candidates.tamper(hr, lr, other, np.random.default_rng(0))
    assert all((a == b).all() for a, b in zip(again, images.values()))


def test_probe_rates_count_ties_as_half():
    scores = np.full((4, 1 + len(candidates.PROBES), 3), 5.0)
    scores[:, 1:] -= 1
    scores[:2, 1] = 6                                                        # the first probe fools it twice
    scores[0, 2] = 5                                                         # and the second ties once
    found = probes.probe_rates(scores, 0)
    first, second = list(candidates.PROBES)[:2]
    assert found["each"][first]["overall"]["value"] == 0.5 and found["each"][second]["overall"]["value"] == 0.875
    assert found["all"]["value"] == pytest.approx((6 * 4 - 2.5) / 24, abs=1e-4)
    assert found["mean_scores"]["hr"] == dict.fromkeys(AXES, 5.0) and probes.probe_rates(None, 0) is None


def test_the_foreign_photograph_is_another_one():
    groups = [{"id": f"{s}{i}", "source": s} for s, n in (("a", 3), ("b", 4)) for i in range(n)]
    partners = probes.strangers(groups)
    assert all(own["id"] != other["id"] for own, other in zip(groups, partners))
    assert sum(own["source"] == other["source"] for own, other in zip(groups, partners)) <= 1


# cases -----------------------------------------------------------------------------------------------------

def test_cases_are_the_groups_with_replies_that_were_ordered_best_and_worst():
    shown = [{"id": "a", "method": "hr"}, {"id": "b", "method": "blur"}]
    groups = [{"id": str(g), "candidates": shown} for g in range(3)]
    scores = np.repeat(np.array([[5.0, 3], [3, 5], [1, 9]])[..., None], 3, 2)
    labels = Labels(np.repeat(np.array([[1.0, 2]] * 3)[..., None], 3, 2), np.full((3, 2, 3), np.nan))
    texts = {"0": [["good"], ["bad"]], "1": [["x"], ["y"]]}                     # group 2, worse still, has no replies
    best, worst = reward_checks.cases(groups, scores, labels, texts)
    assert (best["group"], best["accuracy"], worst["group"], worst["accuracy"]) == ("0", 1.0, "1", 0.0)
    assert [row["replies"] for row in worst["candidates"]] == [["y"], ["x"]]        # the judge's best first
    assert reward_checks.cases(groups, scores, labels, {}) == []
    image = np.zeros((8, 8, 3), np.uint8)
    views = dict.fromkeys("01", {"LR": image, "a": image, "b": image})
    page = "".join(reward_tables.case_figures([best, worst], views))
    assert page.count("<img") == 6 and page.index("1. blur") > page.index("1. hr")
    reply = "<thinking>warp; <b></thinking><answer>consistency: 2, naturalness: 8, overall: 4</answer>"
    assert reward_report.told(reply) == '"warp; <b>" consistency 2, naturalness 8, overall 4'
    assert reward_report.told("no\nanswer") == "not in the asked form: no answer"
    worst["candidates"][0]["replies"] = [reply]
    assert "&lt;b&gt;" in "".join(reward_tables.case_figures([worst], views))
