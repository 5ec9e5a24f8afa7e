"""
Can the judge be trusted? Measured on the test photographs, which no training saw.

Pair accuracy is how often it orders two candidates of one LR image as the labels do; 0.5 is chance. The same pairs are
ordered by its rivals: a judge trained as long without LR (blind=true of 02), which shows what LR is good for; the judge
with the LR image of another photograph; the judge before GRPO; a pretrained model before all training; the mean
training label of a candidate's method, which sees no pixel (without training labels: its mean rank over the other LR
images); PSNR and SSIM, which see the ground truth; LR-PSNR and sharpness. On a few groups three read-outs are compared:
scores that the judge writes (sampled), and expectations over its digits, in one sampled reply (reasoned) and
without (expected). Hacking probes are ground truth that was tampered with (common/candidates.py): an honest judge
scores every one below the ground truth.

A set that people voted on (import_from of stage 01, with judge= of another run) is judged in crops of the size that the
judge learned on, and how far the raters agree with each other is said beside.

With lr_dir and sr_dirs it ranks SR methods on a folder of yours instead (common/ranking.py), without ground truth.

Run     python 03_eval_reward.py configs/demo.yaml
        python 03_eval_reward.py configs/demo.yaml lr_dir=photos/lr sr_dirs=photos/esrgan,ours=photos/v3
        torchrun --standalone --nproc_per_node=8 03_eval_reward.py configs/full.yaml
Reads   <run>/01_build_dataset/   test split; of the train split, which may be missing, the labels for the method prior
        <run>/02_train_reward/    judge/, or the folder given as judge=
        <run>/02_train_reward_blind/    the judge trained without LR, beside the judge, if it is finished
Writes  <run>/03_eval_reward/     report.html (open it in a browser)  table.md  results.json  examples.png  probes.png
                                  scores.jsonl (a line per candidate, with a reply where one was sampled)  manifest.json
        <run>/03_eval_reward_<names>/ or out=, for your folder: report.html  results.json  scores.csv  manifest.json
Expect  on the demo the results table of README.md
"""
import html
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from scipy.ndimage import laplace
from torch import Tensor
from tqdm import tqdm

from common import dist, iqa, metrics, mllm, ranking, report, run
from common.candidates import PROBES, tamper
from common.config import fail, load_config
from common.dist import mine
from common.groups import (all_groups, group_images, judged_on, label_arrays, leave_out, left_out_prior, lr_image,
                           method_prior, shown_sizes)
from common.images import BICUBIC, evenly, luma, resize, sheet, write_png
from common.metrics import AXES, OVERALL
from common.mllm import Judge
from common.prompted import PromptedJudge
from common.replies import answer_logp, sample_replies

# scorer -> (its name in the table, what it sees)
SCORERS = {
    "judge": ("judge", "LR, candidate"),
    "before_grpo": ("judge before GRPO", "LR, candidate"),
    "zero_shot": ("the same model before all training (zero-shot)", "LR, candidate"),
    "lr_shuffled": ("judge, LR of another group", "wrong LR, candidate"),
    "lr_blind": ("judge trained without LR", "candidate"),
    "method_prior": ("method prior", "name of the method, no pixel"),       # see PRIOR_LEFT_OUT
    "psnr": ("PSNR (full-reference)", "ground truth, candidate"),
    "ssim": ("SSIM (full-reference)", "ground truth, candidate"),
    "lr_psnr": ("LR-PSNR", "LR, candidate"),
    "sharpness": ("sharpness", "candidate")}
PRIOR_LEFT_OUT = "method prior: mean rank over the other LR images"      # its name where no training label is
PIXELS = ("psnr", "ssim", "lr_psnr", "sharpness")       # as in pixel_scores: one number for all axes
# the judge's margin over each of these is reported
RIVALS = ("lr_blind", "lr_shuffled", "method_prior", "before_grpo", "zero_shot", "lr_psnr", "sharpness")
ENOUGH_PHOTOGRAPHS = 8                  # from so many on, intervals resample photographs, below LR images
SHOWN = AXES[::-1]                      # order of the axes in tables
TITLE = "The reward model on unseen photographs"
RATER_SPLITS = 200                      # random halves of the raters of an LR image
EXAMPLES = 5                            # rows of examples.png and of probes.png
SORTED = "Sorted by the judge, its best first; frames show the label, from green = best to red = worst"
MAX_REPLY_TOKENS = 64                   # for a judge that came without stage 02


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    judge: str | None = None            # stage-02 folder of another run, a model folder or hub id, or the YAML file of
                                        # a prompt (configs/judge.yaml); none: <run>/02_train_reward
    groups_per_forward: int = 16        # LR groups per forward pass and GPU: memory only
    sampled_groups: int = 12            # groups, spread over the split, with sampled replies, too; 0: none
    sampled_replies: int = 4            # replies per candidate there; the sampled score is their mean
    pyiqa_metrics: list[str] = field(default_factory=list)  # rivals, if pyiqa is installed, e.g. musiq,clipiqa,lpips
    crop: int = 0                       # px of a judged crop of larger images; 0: as large as those it learned on
    crops_per_image: int = 64           # at most, evenly spread; an image's score is the mean over its crops
    # SR methods on a folder of yours, without ground truth: with these, the test split is not looked at --------
    lr_dir: str | None = None           # folder of LR images
    sr_dirs: list[str] = field(default_factory=list)  # per SR method PATH or NAME=PATH; files named as in lr_dir
    out: str | None = None              # folder for the results; none: <run>/03_eval_reward_<names>
    skip_bad: bool = False              # outputs that are missing or of a wrong size are left out, not an error

    def __post_init__(self):
        assert min(self.groups_per_forward, self.sampled_replies) >= 1 and self.sampled_groups >= 0, \
            "groups_per_forward and sampled_replies should be at least 1, sampled_groups 0 or more"
        assert bool(self.lr_dir) == bool(self.sr_dirs), "lr_dir and sr_dirs belong together: give both or none"
        assert self.lr_dir or not self.out, "out is for lr_dir and sr_dirs; without them give run"
        assert self.crop >= 0 and self.crops_per_image >= 1, "crop should be 0 or more, crops_per_image 1 or more"


# what is evaluated -----------------------------------------------------------------------------------------

def load_labeled(folder: Path) -> tuple[list[dict], list[dict]]:
    """The labeled groups of test, two or more that all have C candidates, and of train: perhaps none."""
    test, train = labeled_in(folder, "test"), labeled_in(folder, "train")
    counts = {len(group["candidates"]) for group in test}
    if len(test) < 2 or len(counts) > 1:
        fail(f"{folder}: test has {len(test)} labeled groups of {sorted(counts)} candidates, not 2 or more of one "
             "size: build another data set with 01_build_dataset.py")
    return test, train


def labeled_in(folder: Path, split: str) -> list[dict]:
    """The labeled groups of a split: perhaps none."""
    return [group for group in all_groups(folder) if group["labels"] and group["split"] == split]


def other_groups(groups: list[dict], seed: int) -> list[dict]:
    """
    For each group another one, never itself; of another photograph unless one has more than half of them.

    The groups are shuffled, ordered by photograph, and rotated by the largest photograph's share.
    """
    sources = [group["source"] for group in groups]
    order = sorted(run.np_rng(seed, "other LR").permutation(len(groups)), key=lambda i: sources[i])
    largest = max(map(sources.count, sources))
    return partners(groups, order, largest if largest < len(groups) else 1)


def partners(groups: list[dict], order: list[int], distance: int) -> list[dict]:
    """For each group the one that comes `distance` later in `order`, which begins anew at its end."""
    partner = dict(zip(order, np.roll(order, -distance)))
    return [groups[partner[i]] for i in range(len(groups))]


def data_of(judged_by: Path) -> Path | None:
    """The stage 01 that a judge learned from; None where none lies beside it."""
    source = judged_by.parent / "01_build_dataset"
    return source if (source / "groups.jsonl").exists() else None


def learned_on(judged_by: Path) -> dict[str, int] | None:
    """hr_size (px) and scale of the images that a judge learned on; None where no data set lies beside it."""
    source = data_of(judged_by)
    return judged_on(source) if source else None


def crop_for(judged_by: Path, source: Path) -> int:
    """Side, px, of the crops in which the judge sees `source`: of the images that it learned on, if smaller; else 0."""
    learned = learned_on(judged_by)
    return learned["hr_size"] if learned and learned["hr_size"] < judged_on(source)["hr_size"] else 0


def judge_before_grpo(judge: Judge, judged_by: Path, settings: dict) -> Judge:
    """The judge with the model that GRPO started from."""
    cold, views = judged_by / "cold_start", {"lr_view": judge.lr_view, "candidate_view": judge.candidate_view}
    source = cold / "model" if (cold / "model").is_dir() else settings["model"]
    first = mllm.load_model(source, judge.device, dtype=settings["dtype"], **views)
    if (cold / "adapter").is_dir():
        first.model = mllm.with_adapter(first, cold / "adapter").eval()
    return replace(judge, model=first.model)


def blind_judge(judged_by: Path, settings: dict) -> Path | None:
    """
    The stage-02 folder of the judge trained without LR beside a judge of these settings; None if it is not finished.

    Stops with one line if it learned from other data or by other settings: the two would differ in more than LR.
    """
    blind = judged_by.parent / "02_train_reward_blind"
    if not settings or not (blind / "manifest.json").exists():
        return None
    others, same = run.settings_of(blind, "02_train_reward"), ("run", "blind", *mllm.FREE)
    differ = [f"{key} {settings.get(key)} and {others.get(key)}" for key in settings | others
              if key not in same and settings.get(key) != others.get(key)]
    seen, wanted = (run.read_json(folder / "manifest.json")["inputs"] for folder in (blind, judged_by))
    if differ or seen != wanted:
        fail(f"{blind} was not trained as {judged_by}: {', '.join(differ) or 'on other data'}; delete it, and train it "
             f"again with `{command_for_blind(judged_by)}`")
    return run.require(blind.parent, blind.name, command_for_blind(judged_by))


def command_for_blind(judged_by: Path) -> str:
    """The judge's own settings, but without LR."""
    return f"python 02_train_reward.py {judged_by}/config.yaml run={judged_by.parent} blind=true"


def other_judges(judge: Judge, judged_by: Path, settings: dict, blind: Path | None) -> Iterator[tuple[str, Judge]]:
    """Rivals that are a model, one in memory at a time beside the judge; settings: of its stage 02, {} without."""
    if settings:
        yield "before_grpo", judge_before_grpo(judge, judged_by, settings)
    if blind:
        yield "lr_blind", mllm.load_judge(blind, judge.device)
    if settings.get("model", "small") != "small":
        views = {"lr_view": judge.lr_view, "candidate_view": judge.candidate_view}
        untouched = mllm.load_model(settings["model"], judge.device, dtype=settings["dtype"], **views)
        yield "zero_shot", replace(judge, model=untouched.model)


# scores ----------------------------------------------------------------------------------------------------

def pixel_scores(image: np.ndarray, lr: np.ndarray, hr: np.ndarray | None, *, scale: int) -> list[float]:
    """PSNR, SSIM (NaN without ground truth), LR-PSNR and sharpness: the variance of the Laplacian of luma."""
    reference = [np.nan, np.nan] if hr is None else [metrics.psnr(image, hr), metrics.ssim(image, hr)]
    return [*reference, metrics.lr_psnr(image, lr, scale), float(laplace(luma(image)).var())]


def expected_scores(judge: Judge, lrs: list[np.ndarray], images: list[list[np.ndarray]], *, crop: int, limit: int,
                    batch: int) -> Tensor:
    """
    Scores [g, C, 3] of the candidates of g LR images; crop > 0: means over at most `limit` crops of so many px.

    batch: LR images, or crops of one, per forward pass: memory only.
    """
    if not crop:
        return mllm.expected_scores(judge, lrs, images, groups_per_forward=batch)
    return torch.cat([mllm.scores_in_crops(judge, lr[None], np.stack(candidates)[None], crop=crop, limit=limit,
                                           images_per_forward=batch * len(candidates))
                      for lr, candidates in zip(lrs, images)])


def score_groups(judge: Judge, source: Path, groups: list[dict], shown: list[dict], *, desc: str, batch: int, crop: int,
                 limit: int) -> tuple[Tensor, float]:
    """
    Expected scores of this rank's groups, float64 [g, C, 3], and the seconds that the judge took.

    shown: for each group the one whose LR image the judge sees. crop, limit, batch: see expected_scores.
    """
    scores = [torch.zeros(0, len(groups[0]["candidates"]), len(AXES), dtype=torch.float64)]
    pairs, seconds = list(zip(mine(groups), mine(shown))), 0.0
    for i in tqdm(range(0, len(pairs), batch), desc=desc, unit="batch", disable=not dist.is_main()):
        lrs, images = [], []
        for group, other in pairs[i:i + batch]:
            lr, candidates, _ = group_images(source, group)
            wrong = lr if other is group else lr_image(source, other)
            lrs.append(resize(wrong, lr.shape[1::-1], "bicubic") if crop and other is not group else wrong)
            images.append(candidates)
        started = time.time()
        scores.append(expected_scores(judge, lrs, images, crop=crop, limit=limit, batch=batch).double())
        seconds += time.time() - started
    return torch.cat(scores), seconds


def measure_pixels(source: Path, groups: list[dict], models: dict[str, torch.nn.Module],
                   device: torch.device) -> Tensor:
    """PIXELS, then pyiqa's `models`, of this rank's groups, float64 [g, C, scorers]; all so that higher is better."""
    rows = [torch.zeros(0, len(groups[0]["candidates"]), len(PIXELS) + len(models), dtype=torch.float64)]
    signs = np.array([-1 if model.lower_better else 1 for model in models.values()])
    for group in tqdm(mine(groups), desc="rivals", unit="group", disable=not dist.is_main()):
        lr, images, hr = group_images(source, group)
        rows.append(torch.tensor([[[*pixel_scores(image, lr, hr, scale=group["scale"]),
                                    *signs * iqa.measure(models, image, hr, device)] for image in images]],
                                 dtype=torch.float64))
    return torch.cat(rows)


@torch.no_grad()
def sample(judge: Judge, source: Path, groups: list[dict], *, seed: int, count: int,
           max_tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Of this rank's share of the groups: K = `count` replies per candidate, token ids int64 [g, C, K, max_tokens], padded
    with -1; the probability that a direct answer is one of the nine digits, [g, C, 3]; and the expected scores in the
    first reply that parses, [g, C, 3], NaN where none does.

    A reply's randomness depends on (seed, group, candidate, number) alone.
    """
    candidates = len(groups[0]["candidates"])
    replies = [torch.zeros(0, candidates, count, max_tokens, dtype=torch.int64)]
    masses, reasoned = ([torch.zeros(0, candidates, len(AXES))] for _ in range(2))
    digits = judge.digit_ids.expand(candidates * len(AXES), -1)
    for group in tqdm(mine(groups), desc="sample", unit="group", disable=not dist.is_main()):
        lr, images, _ = group_images(source, group)
        features, grids = mllm.image_features(judge, [[lr, *images]])
        digit_logp = answer_logp(judge, features, grids, [[[] for _ in images]], digits)[2]         # [C * 3, 9]
        masses.append(digit_logp.exp().sum(-1).view(1, candidates, -1).cpu())
        uniforms = torch.rand(candidates, count, max_tokens, generator=run.generator(seed, "sampled", group["id"]))
        written = sample_replies(judge, features, grids, uniforms, [candidates])                    # C x K x ids
        replies.append(torch.tensor([[[ids + [-1] * (max_tokens - len(ids)) for ids in row] for row in written]]))
        parsed = [next((ids for ids in row if mllm.parse_reply(mllm.reply_text(judge, ids))), None) for row in written]
        reasoned.append(mllm.expected_in_reply(judge, features, grids, parsed)[None])
    return torch.cat(replies), torch.cat(masses), torch.cat(reasoned)


def read_replies(judge: Judge, replies: Tensor) -> tuple[dict[tuple, str], np.ndarray]:
    """Texts of replies [g, C, K, tokens], by (group, candidate, number), and scores [g, C, K, 3]; NaN: not parsed."""
    texts, scores = {}, np.full((*replies.shape[:3], len(AXES)), np.nan)
    for place in np.ndindex(*replies.shape[:3]):
        texts[place] = mllm.reply_text(judge, [token for token in replies[place].tolist() if token >= 0])
        if parsed := mllm.parse_reply(texts[place]):
            scores[place] = [parsed[axis] for axis in AXES]
    return texts, scores


# hacking probes --------------------------------------------------------------------------------------------

def strangers(groups: list[dict]) -> list[dict]:
    """For each group another one, half the list away in the order of photographs."""
    return partners(groups, sorted(range(len(groups)), key=lambda i: groups[i]["source"]), len(groups) // 2)


def probe_images(source: Path, group: dict, other: dict, seed: int) -> tuple[np.ndarray, list[np.ndarray]]:
    """LR, and HR followed by its probes, of one group; `other`: the group whose HR is the foreign photograph."""
    lr, _, hr = group_images(source, group | {"candidates": []})
    _, _, foreign = group_images(source, other | {"candidates": []})
    return lr, [hr, *tamper(hr, lr, foreign, run.np_rng(seed, "probe", group["id"]))]


def score_probes(judge: Judge, source: Path, groups: list[dict], *, seed: int, batch: int) -> Tensor:
    """Expected scores of HR and of its probes, float64 [g, 1 + probes, 3], of this rank's groups; all have HR."""
    scores = [torch.zeros(0, 1 + len(PROBES), len(AXES), dtype=torch.float64)]
    pairs = list(zip(mine(groups), mine(strangers(groups))))
    for i in tqdm(range(0, len(pairs), batch), desc="probe", unit="batch", disable=not dist.is_main()):
        lrs, images = zip(*(probe_images(source, group, other, seed) for group, other in pairs[i:i + batch]))
        scores.append(mllm.expected_scores(judge, lrs, images).double())
    return torch.cat(scores)


def probe_rates(scores: np.ndarray, seed: int, units: np.ndarray) -> dict:
    """
    How often HR is scored above its probes (ties count half), from scores [G, 1 + probes, 3]; units: of `resampled`.

    `each`: probe -> axis -> rate; `all`: over all probes, of the overall score. A probe need not show on an axis that
    it does not hurt.
    """
    above = (1 + np.sign(scores[:, :1] - scores[:, 1:])) / 2                                 # [G, probes, 3]
    ones, means = np.ones(len(scores)), scores.mean(0).round(4).tolist()
    return {"groups": len(scores), "all": metrics.rate(above[..., OVERALL].sum(1), len(PROBES) * ones, seed, units),
            "each": {name: {axis: metrics.rate(above[:, p, a], ones, seed, units) for a, axis in enumerate(AXES)}
                     for p, name in enumerate(PROBES)},
            "mean_scores": {name: dict(zip(AXES, row)) for name, row in zip(("hr", *PROBES), means)}}


# statistics ------------------------------------------------------------------------------------------------

def resampled(groups: list[dict]) -> tuple[str, np.ndarray]:
    """What intervals resample: "photographs", if there are enough, or "LR images"; and the number of each group's."""
    names, numbers = np.unique([group["source"] for group in groups], return_inverse=True)
    if len(names) >= ENOUGH_PHOTOGRAPHS:
        return "photographs", numbers
    return "LR images", np.arange(len(groups))


def accuracies(scores: dict[str, np.ndarray], ranks: np.ndarray, seed: int, units: np.ndarray) -> tuple[dict, dict]:
    """
    Scorer -> axis -> rate over the pairs that the labels do not tie; and likewise the judge minus each of RIVALS.

    scores: [G, C, 3] per scorer; ranks [G, C, 3], NaN without label; units: of `resampled`.
    """
    accuracy, margin = {name: {} for name in scores}, {name: {} for name in RIVALS if name in scores}
    for a, axis in enumerate(AXES):
        counts = {name: metrics.pair_accuracy(values[..., a], ranks[..., a])[1:] for name, values in scores.items()}
        for name, (right, pairs) in counts.items():
            accuracy[name][axis] = metrics.rate(right, pairs, seed, units)
        for name in margin:
            margin[name][axis] = metrics.rate(counts["judge"][0] - counts[name][0], counts["judge"][1], seed, units)
    return accuracy, margin


def compare_readouts(sampled: np.ndarray, reasoned: np.ndarray, expected: np.ndarray, ranks: np.ndarray, seed: int,
                     units: np.ndarray) -> dict:
    """
    Sampled [g, C, K, 3], reasoned and expected [g, C, 3] scores of the same candidates, against their ranks [g, C, 3].

    A candidate none of whose replies parses has no sampled score: its pairs are left out for all read-outs.
    """
    mean = torch.from_numpy(sampled).nanmean(2).numpy()                                                     # [g, C, 3]
    accuracy, _ = accuracies({"sampled": mean, "reasoned": reasoned, "expected": expected},
                             np.where(np.isnan(mean), np.nan, ranks), seed, units)
    return {"groups": len(mean), "replies_per_candidate": sampled.shape[2],
            "parse_rate": round(1 - float(np.isnan(sampled[..., 0]).mean()), 4), "accuracy": accuracy}


def accuracy_on_new_methods(groups: list[dict], taught: list[dict], scores: np.ndarray, ranks: np.ndarray,
                            seed: int, units: np.ndarray) -> dict:
    """
    {pairs, value, ci95} over the pairs with a candidate whose method, or a part of it, no group of `taught` has.

    Without `taught` nothing is known of the methods, and there are no such pairs.
    """
    known = {part for group in taught for candidate in group["candidates"] for part in candidate["method"].split("+")}
    right, pairs = np.zeros((2, len(groups)))
    for g, group in enumerate(groups if taught else []):
        new = np.array([not set(candidate["method"].split("+")) <= known for candidate in group["candidates"]])
        hits, better, worse = metrics.pair_hits(scores[g], ranks[g])
        inside = new[better] | new[worse]
        right[g], pairs[g] = hits[inside].sum(), inside.sum()
    return {"pairs": int(pairs.sum()), **metrics.rate(right, pairs, seed, units)}


def rater_agreement(groups: list[dict], seed: int) -> float | None:
    """
    How often two random halves of the raters order two candidates alike, overall. A judge can reach more against all
    raters, as half of them are a noisier measure: if this is a, about (1 + sqrt(2 a - 1)) / 2.

    Each rater has one vote per LR image. Pairs that a half ties are left out. None without such whole votes.
    """
    rng, alike, pairs = run.np_rng(seed, "raters"), 0, 0
    for label in (group["labels"].get("overall", {}) for group in groups):
        votes = label.get("votes")
        if not isinstance(votes, list) or sum(votes) > label.get("raters", 0) or any(vote % 1 for vote in votes):
            continue
        votes = np.array(votes, int)
        i, j = np.triu_indices(len(votes), 1)
        for _ in range(RATER_SPLITS):
            half = rng.multivariate_hypergeometric(votes, votes.sum() // 2)
            order, other = (np.sign(counts[i] - counts[j]) for counts in (half, votes - half))
            alike, pairs = alike + (order * other > 0).sum(), pairs + (order * other != 0).sum()
    return round(float(alike / pairs), 4) if pairs else None


def evaluate(groups: list[dict], taught: list[dict], scores: dict[str, np.ndarray], ranks: np.ndarray, seed: int,
             scorers: dict[str, tuple[str, str]], notes: list[str]) -> dict:
    """
    results.json without read-outs and probes. taught: groups that the judge learned from; scores: [G, C, 3] per scorer,
    NaN where it could not score; scorers: as SCORERS; notes: what is to be said beside.
    """
    sources = sorted({group["source"] for group in groups})
    kinds = sorted({label["source"] for group in groups for label in group["labels"].values()})
    lacking = [name for name, values in scores.items() if np.isnan(values[~np.isnan(ranks)]).any()]
    notes = notes + [f"{scorers[name][0]} left out: some groups lack the ground truth" for name in lacking]
    notes += [f"no label on {axis}" for a, axis in enumerate(AXES) if np.isnan(ranks[..., a]).all()]
    ci_over, units = resampled(groups)
    accuracy, margin = accuracies({name: scores[name] for name in scores if name not in lacking}, ranks, seed, units)
    return {"summary": f"{len(groups)} LR groups x {ranks.shape[1]} candidates of {len(sources)} photographs "
                       f"({', '.join(sources[:4])}{', ..' * (len(sources) > 4)}); labels: {', '.join(kinds)}",
            "ci_over": ci_over, "scorers": {name: scorers[name] for name in accuracy}, "accuracy": accuracy,
            "judge_minus": margin,
            "srcc": {axis: metrics.mean_srcc(scores["judge"][..., a], ranks[..., a]) for a, axis in enumerate(AXES)},
            "new_methods": accuracy_on_new_methods(groups, taught, scores["judge"][..., OVERALL], ranks[..., OVERALL],
                                                   seed, units),
            "rater_agreement": rater_agreement(groups, seed), "readouts": None, "probes": None, "notes": notes}


def headline(results: dict, images_per_second: float) -> dict:
    """The numbers of the manifest; None where there is no label."""
    accuracy, margin, readouts, probes = (results[key] for key in ("accuracy", "judge_minus", "readouts", "probes"))
    absent = dict.fromkeys(AXES, {"value": None, "ci95": None})
    blind = accuracy.get("lr_blind", absent)
    return {"pair_accuracy": accuracy["judge"]["overall"]["value"],
            "pair_accuracy_ci95": accuracy["judge"]["overall"]["ci95"], "ci_over": results["ci_over"],
            "pair_accuracy_lr_blind": blind["overall"]["value"],
            "pair_accuracy_zero_shot": accuracy.get("zero_shot", absent)["overall"]["value"],
            "pair_accuracy_lr_shuffled": accuracy["lr_shuffled"]["overall"]["value"],
            "pair_accuracy_method_prior": accuracy["method_prior"]["overall"]["value"],
            "margin_over_lr_blind_ci95": margin.get("lr_blind", absent)["overall"]["ci95"],
            "margin_over_method_prior_ci95": margin["method_prior"]["overall"]["ci95"],
            "srcc": results["srcc"]["overall"],
            "consistency_accuracy": accuracy["judge"]["consistency"]["value"],
            "naturalness_accuracy": accuracy["judge"]["naturalness"]["value"],
            "consistency_lr_blind": blind["consistency"]["value"],
            "naturalness_lr_blind": blind["naturalness"]["value"],
            "consistency_lr_psnr": accuracy["lr_psnr"]["consistency"]["value"],
            "naturalness_sharpness": accuracy["sharpness"]["naturalness"]["value"],
            "rater_agreement": results["rater_agreement"],
            "pair_accuracy_reasoned": readouts and readouts["accuracy"]["reasoned"]["overall"]["value"],
            "sampled_accuracy": readouts and readouts["accuracy"]["sampled"]["overall"]["value"],
            "parse_rate": readouts and readouts["parse_rate"], "digit_mass": readouts and readouts["digit_mass"],
            "images_per_second": round(images_per_second, 1),
            "probe_rate": probes and probes["all"]["value"], "probe_rate_ci95": probes and probes["all"]["ci95"],
            "held_out_method_accuracy": results["new_methods"]["value"]}


# what people look at ---------------------------------------------------------------------------------------

def cells(rates: dict) -> list[str]:
    """Axis -> rate, as the cells of a table row."""
    return [report.interval(rates[axis]) for axis in SHOWN]


def tables(results: dict) -> report.Parts:
    """What a reader wants to see of results.json."""
    accuracy, new, readouts, probes = (results[key] for key in ("accuracy", "new_methods", "readouts", "probes"))
    scorers = results["scorers"]
    parts = [f"{results['summary']}.", "## Pair accuracy",
             [[f"pair accuracy [95 % interval over {results['ci_over']}]", "sees", *SHOWN],
              *([*scorers[name], *cells(rates)] for name, rates in accuracy.items())],
             [["the judge is better, on the same pairs, than", *SHOWN],
              *([scorers[name][0], *cells(rates)] for name, rates in results["judge_minus"].items())]]
    if results["rater_agreement"]:
        parts.append(f"Two halves of the raters order {results['rater_agreement']:.3f} of the pairs alike, overall.")
    if new["pairs"]:
        parts.append(f"{new['pairs']} pairs have a method that training never showed: {report.interval(new)} overall.")
    if readouts:
        parts += ["## Three read-outs",
                  f"On {readouts['groups']} groups. Sampled: mean of the scores in "
                  f"{readouts['replies_per_candidate']} replies ({readouts['parse_rate']:.1%} of them parse). "
                  "Reasoned: expectations at the digits of one of them. Expected: expectations without "
                  f"a thought, where digits hold {readouts['digit_mass']:.1%} of the probability of all tokens.",
                  [["pair accuracy", *SHOWN], *([kind, *cells(rates)] for kind, rates in readouts["accuracy"].items())]]
    if probes:
        means = {name: f"{scores['overall']:.2f}" for name, scores in probes["mean_scores"].items()}
        rows = [[name, how, report.interval(probes["each"][name]["overall"]),
                 f"{report.interval(probes['each'][name][axis])} ({axis})", means[name]]
                for name, (axis, how) in PROBES.items()]
        parts += ["## Hacking probes", f"How often the judge scores the ground truth of {probes['groups']} LR images, "
                  f"{means['hr']} overall on average, above a tampered version of it.",
                  [["probe", "made how", "by the overall score", "by the axis that it hurts", "mean overall"], *rows,
                   ["all", "", report.interval(probes["all"]), "", ""]]]
    return parts + [f"- {note}" for note in results["notes"]]


def framed(image: np.ndarray, goodness: float) -> np.ndarray:
    """uint8 [H, W, 3] in a frame from red (0) to green (1)."""
    width = max(1, len(image) // 24)
    inside = image[width:-width, width:-width]
    color = np.array([220 * min(1, 2 - 2 * goodness), 160 * min(1, 2 * goodness), 40]).astype(np.uint8)
    return np.stack([np.pad(inside[..., c], width, constant_values=color[c]) for c in range(3)], 2)


def examples(source: Path, groups: list[dict], scores: np.ndarray, ranks: np.ndarray) -> np.ndarray:
    """
    A row per group: LR, then the candidates, the judge's best first, framed from green (label rank 1) to red; uint8.

    scores, ranks: [G, C, 3]; shown is overall, or else the first axis with labels.
    """
    a = next(AXES.index(axis) for axis in SHOWN if not np.isnan(ranks[..., AXES.index(axis)]).all())
    labeled = np.nonzero(~np.isnan(ranks[..., a]).any(1))[0]
    rows, below = [], []
    for g in labeled[evenly(len(labeled), EXAMPLES)]:
        lr, images, _ = group_images(source, groups[g])
        order, worst = np.argsort(-scores[g, :, a], kind="stable"), max(2, ranks[g, :, a].max())
        rows.append([lr, *(framed(images[c], (worst - ranks[g, c, a]) / (worst - 1)) for c in order)])
        below.append([groups[g]["id"], *(f"{scores[g, c, a]:.2f}, rank {ranks[g, c, a]:g}: "
                                         f"{groups[g]['candidates'][c]['method']}"[:30] for c in order)])
    return sheet(rows, ["LR", *(f"{AXES[a]}: place {place + 1}" for place in range(ranks.shape[1]))], below=below)


def probe_sheet(source: Path, groups: list[dict], scores: np.ndarray, seed: int) -> np.ndarray:
    """LR, HR and its probes of a few groups, with their overall scores from [G, 1 + probes, 3]; uint8."""
    others, rows, below = strangers(groups), [], []
    for g in evenly(len(groups), EXAMPLES):
        lr, images = probe_images(source, groups[g], others[g], seed)
        rows.append([lr, *images])
        below.append([groups[g]["id"], *(f"overall {score:.2f}" for score in scores[g, :, OVERALL])])
    return sheet(rows, ["LR", "hr (honest)", *PROBES], below=below)


def page(results: dict, pictures: dict[str, np.ndarray]) -> bytes:
    """report.html: the main numbers, the pictures (title -> uint8 [H, W, 3]), and the table."""
    numbers = {"pair accuracy": (results["accuracy"]["judge"]["overall"]["value"], "overall, unseen photographs"),
               "probes below the truth": (results["probes"] and results["probes"]["all"]["value"],
                                          "tampered images scored below the ground truth"),
               "rank correlation": (results["srcc"]["overall"], "Spearman's, mean over groups")}
    return report.page(TITLE, [
        "<p>How far can the reward model be trusted? It was asked about photographs that it never saw in training. "
        "Pair accuracy: how often it orders two candidates of one low-resolution image as the labels do; 0.5 is "
        "chance.</p>",
        report.cards([(name, "-" if value is None else f"{value:.3f}", note)
                      for name, (value, note) in numbers.items()]),
        *(f'<h2>{html.escape(title)}</h2><div class="plot">{report.png_tag(image, title)}</div>'
          for title, image in pictures.items()),
        "<h2>In numbers</h2>", report.text(tables(results))]).encode()


def score_lines(groups: list[dict], scores: np.ndarray, texts: dict[tuple, str]) -> list[dict]:
    """scores.jsonl: the expected scores [G, C, 3] of every candidate, its labels, and a reply where texts has one."""
    return [{"group": group["id"], "candidate": candidate["id"], "method": candidate["method"],
             "expected": dict(zip(AXES, scores[g, c].tolist())),
             "labels": {axis: {key: label[f"{key}s"][c] for key in ("rank", "score") if label.get(f"{key}s")}
                        for axis, label in group["labels"].items()},
             "reply": texts.get((g, c))}
            for g, group in enumerate(groups) for c, candidate in enumerate(group["candidates"])]


# SR methods on a folder ------------------------------------------------------------------------------------

def own_accuracy(judged_by: Path) -> float | None:
    """The judge's pair accuracy in the stage 03 beside it; None if there is none, or it evaluated another judge."""
    tested, judge = judged_by.parent / "03_eval_reward" / "manifest.json", judged_by / "manifest.json"
    if not (tested.exists() and judge.exists()):
        return None
    found = run.read_json(tested)
    same = found["inputs"].get(judged_by.name) == run.sha256(judge)
    return found["results"]["pair_accuracy"] if same else None


def rank_folders(cfg: Config) -> None:
    """Rank the SR methods of sr_dirs on the LR images of lr_dir, in a folder of its own; no ground truth."""
    started, device = time.time(), dist.init()
    judged_by = Path(cfg.judge) if cfg.judge else run.require(cfg.run, "02_train_reward")
    learned = learned_on(judged_by)
    if not (cfg.crop or learned):
        fail(f"{judged_by.parent / '01_build_dataset'} is missing, so the size of the images that the judge "
             f"{judged_by} learned on is unknown: correct judge=, or set crop=, in px")
    judge, side = mllm.load_judge(judged_by, device), cfg.crop or learned["hr_size"]
    mllm.check_sizes(judge, {(side, side)}, "set crop= so")
    named = ranking.method_folders(cfg.sr_dirs)
    scenes, left_out = ranking.match(cfg.lr_dir, named, skip_bad=cfg.skip_bad)
    name = re.sub(r"[^\w.-]+", "_", "_".join([Path(cfg.lr_dir).resolve().name, *named]))[:80]
    folder = run.open_stage(cfg, __file__, Path(cfg.out or f"{cfg.run}/03_eval_reward_{name}"))
    scenes, unusable = ranking.survey(scenes, list(named), skip_bad=cfg.skip_bad)
    left_out, methods = left_out + unusable, [*named, BICUBIC]
    dist.print0(f"{len(scenes)} LR images, {len(methods)} methods, crops of {side} px; {len(left_out)} files left out")

    measured = dist.gather_rows(ranking.score_all(
        judge, scenes, methods, side=side, limit=cfg.crops_per_image,
        batch=cfg.groups_per_forward)).numpy().round(4)
    if (lost := np.isnan(measured[..., OVERALL]).all(0)).any():
        fail(f"{judged_by}: no reply about {methods[lost.argmax()]} could be read: change its prompt or pattern")
    rows = ranking.rank_methods(measured[..., :3], methods, cfg.seed)
    unread = dist.all_sum(torch.tensor(len(judge.unread))) if isinstance(judge, PromptedJudge) else 0
    if dist.is_main():
        notes = [f"judged in crops of {side} x {side} px, at most {cfg.crops_per_image} per image; a score is the mean"]
        notes += [f"{unread} replies of the judge did not fit its pattern: their crops are left out"] if unread else []
        if learned:
            notes.append(f"the judge learned in crops of {learned['hr_size']} px at scale {learned['scale']}")
        ranking.write(folder, scenes, measured, methods, side=side, results={
            "summary": f"{len(scenes)} LR images of {cfg.lr_dir}, outputs of {', '.join(named)}",
            "ranking": rows, "lr_images": len(scenes), "notes": notes, "left_out": left_out,
            "judge_accuracy": own_accuracy(judged_by)})
        print(f"open {folder / 'report.html'} in a browser")
    run.write_manifest(folder, script=__file__, started=started, inputs=[judged_by], results={
        "ranking": [row["method"] for row in rows], "overall": [row["overall"]["value"] for row in rows],
        "lr_images": len(scenes), "files_left_out": len(left_out)})
    dist.finish()


# the stage -------------------------------------------------------------------------------------------------

@run.explained()
def main(cfg: Config) -> None:
    if cfg.lr_dir:
        return rank_folders(cfg)
    started, device = time.time(), dist.init()
    folder = run.open_stage(cfg, __file__, free=("groups_per_forward",))
    source = run.require(cfg.run, "01_build_dataset")
    judged_by = Path(cfg.judge) if cfg.judge else run.require(cfg.run, "02_train_reward")
    settings = run.settings_of(judged_by, "02_train_reward")
    blind, models = blind_judge(judged_by, settings), iqa.load(cfg.pyiqa_metrics, device)
    groups, train = load_labeled(source)
    crop = cfg.crop or (crop_for(judged_by, source) if cfg.judge else 0)        # this run's judge learned on this size
    learned_from = data_of(judged_by) if cfg.judge else source
    taught = labeled_in(learned_from, "train") if learned_from else []
    train, taught = (leave_out(some, settings.get("held_out_methods", [])) for some in (train, taught))
    judge = mllm.load_judge(judged_by, device)
    prompted = isinstance(judge, PromptedJudge)                 # it writes its scores: there is no second read-out
    with_hr = [g for g, group in enumerate(groups) if group["hr"] and not crop and not prompted]
    chosen = evenly(len(groups), 0 if crop or prompted else cfg.sampled_groups)      # as probes: whole images
    mllm.check_sizes(judge, shown_sizes(source, groups, crop), "set crop= so")
    dist.print0(f"{len(groups)} groups; {len(chosen)} of them get {cfg.sampled_replies} sampled replies per candidate")

    # 1. every rank scores its share of the groups; the slowest rank's time counts
    forward = dict(batch=cfg.groups_per_forward, crop=crop, limit=cfg.crops_per_image)
    measured = {"lr_shuffled": score_groups(judge, source, groups, other_groups(groups, cfg.seed), desc="wrong LR",
                                            **forward)[0]}
    measured["judge"], seconds = score_groups(judge, source, groups, groups, desc="judge", **forward)
    for name, rival in other_judges(judge, judged_by, settings, blind):
        measured[name], _ = score_groups(rival, source, groups, groups, desc=name, **forward)
        del rival                                               # before the next is loaded
    names = [*PIXELS, *(f"pyiqa_{name}" for name in models)]
    for name, column in zip(names, measure_pixels(source, groups, models, device).unbind(-1)):
        measured[name] = column[..., None].expand(-1, -1, len(AXES))
    scorers = SCORERS | {f"pyiqa_{name}": (f"{name} (pyiqa)", "ground truth, candidate" if iqa.needs_truth(model) else
                                           "candidate") for name, model in models.items()}
    scores = {name: dist.gather_rows(measured[name]).numpy().round(4)   # as in scores.jsonl: noise decides nothing
              for name in scorers if name in measured}
    seconds = float(dist.gather_rows(torch.tensor([seconds])).max())

    # 2. sampled replies on some groups
    replies = None
    if chosen:
        replies, mass, reasoned = map(dist.gather_rows, sample(
            judge, source, [groups[g] for g in chosen], seed=cfg.seed, count=cfg.sampled_replies,
            max_tokens=settings.get("max_reply_tokens", MAX_REPLY_TOKENS)))

    # 3. hacking probes, where there is a ground truth to tamper with
    probed = None
    if len(with_hr) > 1:
        probed = dist.gather_rows(score_probes(judge, source, [groups[g] for g in with_hr], seed=cfg.seed,
                                               batch=cfg.groups_per_forward)).numpy().round(4)

    # 4. results, and pictures of them
    if dist.is_main():
        ranks, (_, units) = label_arrays(groups).ranks, resampled(groups)
        scores["method_prior"] = np.nan_to_num(method_prior(groups, train) if train else left_out_prior(groups))
        if not train:
            scorers["method_prior"] = (PRIOR_LEFT_OUT, scorers["method_prior"][1])
        scores, notes = {name: scores[name] for name in scorers if name in scores}, []
        if not settings:
            notes.append("judge before GRPO and judge trained without LR left out: the judge came without stage 02")
        elif not blind:
            notes.append(f"judge trained without LR left out: to get one, `{command_for_blind(judged_by)}`")
        if settings.get("model") == "small" and replies is not None:
            notes.append("the words of the small model carry nothing: its cold start taught it templates")
        unread = np.isnan(scores["judge"]) | np.isnan(scores["lr_shuffled"])    # [G, C, 3] of a PromptedJudge alone
        if unread.all():
            fail(f"{judged_by}: no reply of the judge fits its pattern; the first is shown above")
        if prompted:
            notes.append(f"{unread[..., 0].mean():.1%} of the candidates left out, as a reply did not fit the pattern")
        if crop:
            notes.append(f"images are larger than those the judge learned on: its scores are means over crops of "
                         f"{crop} px, at most {cfg.crops_per_image} of each")
        results, texts = evaluate(groups, taught, scores, np.where(unread, np.nan, ranks), cfg.seed, scorers,
                                  notes), {}
        results["unread_replies"] = round(float(np.isnan(scores["judge"][..., 0]).mean()), 4) if prompted else None
        if replies is not None:
            written, sampled = read_replies(judge, replies)
            texts = {(chosen[g], c): text for (g, c, number), text in written.items() if number == 0}
            results["readouts"] = {"digit_mass": round(float(mass.mean()), 4)} | compare_readouts(
                sampled, reasoned.double().numpy().round(4), scores["judge"][chosen], ranks[chosen], cfg.seed,
                units[chosen])
        pictures = {SORTED: examples(source, groups, scores["judge"], ranks)}
        write_png(folder / "examples.png", pictures[SORTED])
        if probed is not None:
            results["probes"] = probe_rates(probed, cfg.seed, units[with_hr])
            pictures["Hacking probes"] = probe_sheet(source, [groups[g] for g in with_hr], probed, cfg.seed)
            write_png(folder / "probes.png", pictures["Hacking probes"])
        run.write_lines(folder / "scores.jsonl", score_lines(groups, scores["judge"], texts))
        run.write_json(folder / "results.json", results)
        run.write_bytes(folder / "table.md", report.markdown([f"# {TITLE}", *tables(results)]).encode())
        run.write_bytes(folder / "report.html", page(results, pictures))
        run.write_manifest(folder, script=__file__, started=started, inputs=[source, judged_by],
                           results=headline(results, ranks[..., 0].size / seconds))
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
