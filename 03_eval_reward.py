"""
Evaluate the reward model on the test photographs: how often does it order two candidates of one LR rightly?

The same pairs are also ordered by the judge with a wrong LR (of another group) or a flat gray one, which
shows whether the LR is used; by the judge before GRPO; by the mean training label of a candidate's method,
which sees no pixel; and by PSNR, SSIM (both see the ground truth), LR-PSNR and sharpness. On some groups the
two read-outs of the judge, sampled and expected, are compared, and another model may be asked for the better
of two candidates (pair_model). Hacking probes (common/probes.py) are ground truth that was tampered with: the
judge should score them below it. The calibration that came with the judge is tested.

With lr_dir and sr_dirs it ranks SR methods on a folder of yours instead: no ground truth, no labels.

Run     python 03_eval_reward.py configs/demo.yaml
        python 03_eval_reward.py configs/demo.yaml lr_dir=photos/lr sr_dirs=photos/esrgan,ours=photos/v3
        torchrun --standalone --nproc_per_node=8 03_eval_reward.py configs/full.yaml
Reads   <run>/01_build_dataset/   test and validation split; of the train split only the labels, for the method table
        <run>/02_train_reward/    judge/
Writes  <run>/03_eval_reward/     report.html (open it in a browser)  results.json  table.md  plot.png  examples.png
                                  probes.png  manifest.json
                                  scores.jsonl (a line per candidate, with a sampled reply where there is one)
        <run>/03_eval_reward_<names>/ or out=, for your folder: report.html  results.json  table.md  scores.csv
                                  scores.jsonl  contact_sheet.png  skipped.jsonl  manifest.json
Expect  on the demo see the results table in README.md
"""
import json
import re
import time
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from scipy.ndimage import laplace
from torch import Tensor
from tqdm import tqdm

from common import (dist, metrics, mllm, mllm_labels, pair_mode, probes, ranking_report, reward_checks,
                    reward_report, reward_tables, run, sr_judging)
from common.config import fail, load_config, read_yaml
from common.dist import mine
from common.groups import Labels, group_images, judged_on, label_arrays, leave_out, load_groups, method_prior
from common.images import write_png
from common.metrics import AXES
from common.mllm import Judge
from common.replies import answer_logp, sample_replies
from common.reward_report import SCORERS, SHOWN
from common.reward_stats import accuracies, accuracy_by_gap, compare_readouts, mean_srcc
from common.sr_folders import BICUBIC, match, named_folders, notes, survey

MEASURED = ("lr_shuffled", "lr_gray", "before_grpo", "judge", "psnr", "ssim", "lr_psnr", "sharpness")


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    groups_per_forward: int = 16        # LR groups per forward pass and GPU: memory only
    sampled_groups: int = 12            # groups, spread over the split, with sampled replies, too; 0: none
    sampled_replies: int = 4            # replies per candidate there; the sampled score is their mean
    example_groups: int = 5             # rows of examples.png
    pair_model: str | None = None       # hub id or folder of an image-text-to-text model that is asked for the better
                                        # of two candidates, in both orders, on those sampled_groups; none: not asked
    pair_batch: int = 8                 # questions at once: memory only
    # SR methods on a folder of yours, without ground truth: with these, the test split is not looked at --------
    lr_dir: str | None = None           # folder of LR images
    sr_dirs: list[str] = field(default_factory=list)  # per SR method PATH or NAME=PATH; files named as in lr_dir
    out: str | None = None              # folder for the results; none: <run>/03_eval_reward_<names>
    crop: int = 0                       # px of a judged crop of an output; 0: as large as those the judge learned on
    crops_per_image: int = 64           # at most, evenly spread; an image's score is the mean over its crops
    bicubic: bool = True                # LR up-sampled takes part, for comparison
    skip_bad: bool = False              # outputs that are missing or of a wrong size are left out, not an error

    def __post_init__(self):
        least = min(self.groups_per_forward, self.sampled_replies, self.example_groups)
        assert least >= 1, "groups_per_forward, sampled_replies and example_groups should be at least 1"
        assert self.pair_batch >= 1 and (self.sampled_groups or not self.pair_model), \
            "pair_model needs sampled_groups, and pair_batch should be at least 1"
        assert bool(self.lr_dir) == bool(self.sr_dirs), "lr_dir and sr_dirs belong together: give both or none"
        assert self.lr_dir or not self.out, "out is for lr_dir and sr_dirs; without them give run"
        assert self.crop >= 0 and self.crops_per_image >= 1, "crop should be 0 or more, crops_per_image 1 or more"


# data ----------------------------------------------------------------------------------------------------

def load_labeled(folder: Path, split: str, least: int = 2) -> tuple[list[dict], Labels]:
    """The groups of a split that have labels, and these; all with the same number of candidates C."""
    groups = [group for group in load_groups(folder, split) if group["labels"]]
    counts = {len(group["candidates"]) for group in groups}
    if len(groups) < least or len(counts) > 1:
        fail(f"{folder}: {split} has {len(groups)} labeled groups of {sorted(counts)} candidates, "
                 f"not {least} or more of one size: build another data set with 01_build_dataset.py")
    return groups, label_arrays(groups)


def other_groups(groups: list[dict], seed: int) -> list[dict]:
    """
    For each group another one, never itself; of another photograph unless one has more than half of them.

    The groups are shuffled, ordered by photograph, and rotated by the largest photograph's share.
    """
    sources = [group["source"] for group in groups]
    order = sorted(run.np_rng(seed, "other LR").permutation(len(groups)), key=lambda i: sources[i])
    largest = max(map(sources.count, sources))
    partner = dict(zip(order, np.roll(order, -largest if largest < len(groups) else -1)))
    return [groups[partner[i]] for i in range(len(groups))]


def spread(items: list, count: int) -> list:
    """`count` items, evenly spaced, so that every photograph has its share; all if there are fewer."""
    return [items[i] for i in np.linspace(0, len(items) - 1, min(count, len(items))).astype(int)]


def judge_before_grpo(judge: Judge, trained: Path, settings: dict) -> Judge:
    """The model that GRPO started from: the judge itself, to be used with its adapter off, if it has one."""
    if isinstance(judge.model, PeftModel):
        return judge
    source = trained / "cold_start" / "model" if settings["cold_start_steps"] else settings["model"]
    views = {"lr_view": judge.lr_view, "candidate_view": judge.candidate_view}
    return replace(judge, model=mllm.load_model(source, judge.device, dtype=settings["dtype"], **views).model)


# scores --------------------------------------------------------------------------------------------------

def pixel_scores(image: np.ndarray, lr: np.ndarray, hr: np.ndarray | None, *, scale: int) -> list[float]:
    """PSNR, SSIM (NaN without ground truth), LR-PSNR and sharpness: the variance of the Laplacian of luma."""
    reference = [np.nan, np.nan] if hr is None else [metrics.psnr(image, hr), metrics.ssim(image, hr)]
    luma = image @ np.array([0.299, 0.587, 0.114])
    return [*reference, metrics.lr_psnr(image, lr, scale), float(laplace(luma).var())]


def measure(cfg: Config, judge: Judge, source: Path, *, before: Judge, groups: list[dict],
            others: list[dict]) -> tuple[Tensor, float]:
    """
    MEASURED scores of this rank's groups, float64 [g, C, scorers, 3 axes], and seconds that the judge took.

    before: the judge before GRPO. others: the groups whose LR takes the place of the right one. A scorer with one
    number for all axes repeats it.
    """
    scores = [torch.zeros(0, len(groups[0]["candidates"]), len(MEASURED), len(AXES), dtype=torch.float64)]
    own, seconds = list(zip(mine(groups), mine(others))), 0.0
    starts = range(0, len(own), cfg.groups_per_forward)
    bar = tqdm(starts, desc="score", unit="batch", disable=not dist.is_main())
    for i in bar:
        part, partners = zip(*own[i:i + cfg.groups_per_forward])
        lrs, images, hrs = zip(*(group_images(source, group) for group in part))
        wrong = [group_images(source, group | {"candidates": [], "hr": None})[0] for group in partners]
        gray = [np.full_like(lr, 128) for lr in lrs]
        learned = [mllm.expected_scores(judge, views, images) for views in (wrong, gray)]
        with mllm.adapter_off(before):
            learned.append(mllm.expected_scores(before, lrs, images))
        started = time.time()
        learned.append(mllm.expected_scores(judge, lrs, images))         # timed last, when everything is warm
        seconds += time.time() - started
        pixels = torch.tensor([[pixel_scores(image, lr, hr, scale=group["scale"]) for image in candidates]
                               for group, lr, candidates, hr in zip(part, lrs, images, hrs)], dtype=torch.float64)
        pixels = pixels[..., None].expand(-1, -1, -1, len(AXES))                      # [g, C, 4, 3]
        scores.append(torch.cat([torch.stack(learned, dim=2).double(), pixels], dim=2))
    return torch.cat(scores), seconds


@torch.no_grad()
def sample(cfg: Config, judge: Judge, source: Path, *, groups: list[dict], max_tokens: int) -> tuple[Tensor, Tensor]:
    """
    Of this rank's share of the groups: token ids of the replies, int64 [g, C, K, max_tokens], padded with -1; and the
    probability that a direct answer is one of the nine digits, [g, C, 3].

    A reply's randomness depends on (seed, group, candidate, number) alone.
    """
    count, k = len(groups[0]["candidates"]), cfg.sampled_replies
    replies, masses = [torch.zeros(0, count, k, max_tokens, dtype=torch.int64)], [torch.zeros(0, count, len(AXES))]
    digits = judge.digit_ids.expand(count * len(AXES), -1)
    bar = tqdm(mine(groups), desc="sample", unit="group", disable=not dist.is_main())
    for group in bar:
        lr, images, _ = group_images(source, group)
        features, grids = mllm.image_features(judge, [[lr, *images]])
        digit_logp = answer_logp(judge, features, grids, [[[] for _ in images]], digits)[2]         # [C * 3, 9]
        masses.append(digit_logp.exp().sum(-1).view(1, count, -1).cpu())
        uniforms = torch.rand(count, k, max_tokens, generator=run.generator(cfg.seed, "sampled", group["id"]))
        written = sample_replies(judge, features, grids, uniforms, [count])
        padded = [[ids + [-1] * (max_tokens - len(ids)) for ids in own] for own in written]
        replies.append(torch.tensor([padded]))
    return torch.cat(replies), torch.cat(masses)


def read_replies(judge: Judge, replies: Tensor) -> tuple[list[list[list[str]]], Tensor]:
    """Texts [g][C][K] and their scores, float64 [g, C, K, 3]; NaN where a reply does not parse."""
    texts = [[[mllm.reply_text(judge, [i for i in ids if i >= 0]) for ids in own] for own in group]
             for group in replies.tolist()]
    unparsed = dict.fromkeys(AXES, torch.nan)
    scores = [[[[(mllm.parse_reply(text) or unparsed)[axis] for axis in AXES] for text in own]
               for own in group] for group in texts]
    return texts, torch.tensor(scores, dtype=torch.float64)


# results -------------------------------------------------------------------------------------------------

def summarize(groups: list[dict], labels: Labels) -> str:
    """What was evaluated, in one line."""
    photographs = sorted({group["source"] for group in groups})
    names = ", ".join(photographs[:4]) + f" and {len(photographs) - 4} more" * (len(photographs) > 4)
    kinds = sorted({label["source"] for group in groups for label in group["labels"].values()})
    kinds = ", ".join("proxy, computed with the ground truth" if kind == "proxy" else kind for kind in kinds)
    return f"{len(groups)} LR groups x {labels.ranks.shape[1]} candidates of {names}; labels: {kinds}"


def evaluate(groups: list[dict], scores: dict[str, np.ndarray], labels: Labels, *, seed: int) -> dict:
    """All of results.json but the read-outs. scores: [G, C, 3] per scorer; NaN where it could not score."""
    lacking = [name for name, own in scores.items() if np.isnan(own[~np.isnan(labels.ranks)]).any()]
    notes = [f"{SCORERS[name][0]} left out: some groups lack the ground truth" for name in lacking]
    notes += [f"no label on {axis}" for a, axis in enumerate(AXES) if np.isnan(labels.ranks[..., a]).all()]
    accuracy, margin = accuracies({k: v for k, v in scores.items() if k not in lacking}, labels.ranks, seed)
    return {"summary": summarize(groups, labels), "accuracy": accuracy, "judge_minus": margin,
            "srcc": mean_srcc(scores["judge"], labels.ranks),
            "judge_by_gap": accuracy_by_gap(scores["judge"], labels, seed), "readouts": None, "pair_mode": None,
            "notes": notes}


# SR methods on a folder -----------------------------------------------------------------------------------

def settings_of(stage: Path) -> dict:
    """The settings that a finished stage recorded."""
    return {key: value for _, key, value in read_yaml(str(stage / "config.yaml"), stage.name)}


def rank_folders(cfg: Config) -> None:
    """Rank the SR methods of sr_dirs on the LR images of lr_dir, in a folder of its own; no ground truth."""
    started = time.time()
    device = dist.init()
    source, trained = run.require(cfg.run, "01_build_dataset"), run.require(cfg.run, "02_train_reward")
    named = named_folders(cfg.sr_dirs)
    name = re.sub(r"[^\w.-]+", "_", "_".join([Path(cfg.lr_dir).resolve().name, *named]))[:80]
    scenes, skipped = match(cfg.lr_dir, named, cfg.skip_bad)
    folder = run.open_stage(cfg, __file__, Path(cfg.out or f"{cfg.run}/{Path(__file__).stem}_{name}"))
    scenes, unusable = survey(scenes, cfg.skip_bad)
    skipped, methods = skipped + unusable, [*named, *[BICUBIC] * cfg.bicubic]
    if idle := [method for method in named if not any(method in scene.outputs for scene in scenes)]:
        fail(f"sr_dirs: nothing of {idle[0]} is left to judge; {skipped[0]['file']}: {skipped[0]['reason']}")
    made, judge = settings_of(source) | judged_on(source), mllm.load_judge(trained, device)
    side = cfg.crop or made["hr_size"]
    dist.print0(f"{len(scenes)} LR images, {len(methods)} methods, crops of {side} px; {len(skipped)} files left out")

    clock = time.time()
    measured = dist.gather_rows(sr_judging.score_all(cfg, judge, scenes, methods, side=side)).numpy().round(4)
    rate = round(float(np.nansum(measured[..., 3])) / (time.time() - clock), 1)
    results = sr_judging.rank_methods(measured[..., :3], methods, cfg.seed)
    order = [methods.index(row["method"]) for row in results["ranking"]]
    if dist.is_main():
        shown = sr_judging.examples(
            cfg, judge, scenes, measured=measured[:, order], methods=[methods[m] for m in order], side=side,
            max_tokens=settings_of(trained)["max_reply_tokens"])
        tested = Path(cfg.run) / Path(__file__).stem / "manifest.json"
        record = run.read_json(tested) if tested.exists() else {}
        results |= {"summary": f"{len(scenes)} LR images of {cfg.lr_dir}, outputs of {', '.join(named)}",
                    "judge_accuracy": record["results"]["pair_accuracy"] if record else None,
                    "notes": notes(scenes, made, side=side, limit=cfg.crops_per_image)}
        ranking_report.write(folder, results, measured=measured, scenes=scenes, methods=methods, shown=shown,
                             skipped=skipped, maps=run.read_json(trained / "judge" / "calibration.json"))
        print(f"open {folder / 'report.html'} in a browser")
    run.write_manifest(folder, script=__file__, started=started, inputs=[source, trained], results={
        "ranking": [methods[m] for m in order], "overall": [row["overall"]["value"] for row in results["ranking"]],
        "lr_images": len(scenes), "files_left_out": len(skipped), "crops_per_second": rate})
    dist.finish()


# the stage -----------------------------------------------------------------------------------------------

def score_lines(groups: list[dict], scores: np.ndarray, texts: dict[str, list[list[str]]]) -> bytes:
    """scores.jsonl: the expected scores of every candidate, its labels, and its first reply where sampled."""
    lines = []
    for group, own in zip(groups, scores):
        for c, candidate in enumerate(group["candidates"]):
            labels = {axis: {key: label[f"{key}s"][c] for key in ("rank", "score") if label.get(f"{key}s")}
                      for axis, label in group["labels"].items()}
            expected = dict(zip(AXES, own[c].tolist()))
            reply = texts[group["id"]][c][0] if group["id"] in texts else None
            lines.append({"group": group["id"], "candidate": candidate["id"], "method": candidate["method"],
                          "expected": expected, "labels": labels, "reply": reply})
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def examples(cfg: Config, source: Path, groups: list[dict], *, labels: Labels, scores: np.ndarray) -> bytes:
    """examples.png, on overall or else the first axis that has labels."""
    axis = next(axis for axis in SHOWN if any(axis in group["labels"] for group in groups))
    shown = spread([g for g, group in enumerate(groups) if axis in group["labels"]], cfg.example_groups)
    a = AXES.index(axis)
    return reward_report.examples(source, [groups[g] for g in shown], axis=axis, scores=scores[shown, :, a],
                                  ranks=labels.ranks[shown, :, a])


def case_views(source: Path, groups: list[dict], cases: list[dict]) -> dict[str, dict[str, np.ndarray]]:
    """The images of the groups that are shown with what the judge wrote: group -> LR and candidate id -> image."""
    found = {}
    for group in groups:
        if group["id"] in [case["group"] for case in cases]:
            lr, images, _ = group_images(source, group)
            ids = [candidate["id"] for candidate in group["candidates"]]
            found[group["id"]] = {"LR": lr} | dict(zip(ids, images))
    return found


def headline(results: dict, images_per_second: float) -> dict:
    """The numbers of the manifest; None where there is no label."""
    found, readouts = results["accuracy"], results["readouts"]
    return {"pair_accuracy": found["judge"]["overall"]["value"],
            "pair_accuracy_ci95": found["judge"]["overall"]["ci95"],
            "pair_accuracy_lr_blind": found["lr_gray"]["overall"]["value"],
            "pair_accuracy_lr_shuffled": found["lr_shuffled"]["overall"]["value"],
            "pair_accuracy_method_prior": found["method_prior"]["overall"]["value"],
            "margin_over_lr_blind_ci95": results["judge_minus"]["lr_gray"]["overall"]["ci95"],
            "margin_over_method_prior_ci95": results["judge_minus"]["method_prior"]["overall"]["ci95"],
            "srcc": results["srcc"]["overall"],
            "consistency_accuracy": found["judge"]["consistency"]["value"],
            "naturalness_accuracy": found["judge"]["naturalness"]["value"],
            "sampled_accuracy": readouts and readouts["accuracy"]["sampled"]["overall"]["value"],
            "parse_rate": readouts and readouts["parse_rate"], "digit_mass": readouts and readouts["digit_mass"],
            "images_per_second": round(images_per_second, 1), **reward_checks.headline(results)}


@run.explained()
def main(cfg: Config) -> None:
    if cfg.lr_dir:
        return rank_folders(cfg)
    started = time.time()
    device = dist.init()
    folder = run.open_stage(cfg, __file__, free=("groups_per_forward", "pair_batch"))
    source, trained = run.require(cfg.run, "01_build_dataset"), run.require(cfg.run, "02_train_reward")
    if cfg.pair_model:
        mllm_labels.find(cfg.pair_model, "pair_model")          # a wrong name should not wait for all scores
    settings = settings_of(trained)
    groups, labels = load_labeled(source, "test")
    chosen = spread(range(len(groups)), cfg.sampled_groups)
    judge = mllm.load_judge(trained, device)
    dist.print0(f"{summarize(groups, labels)}\nevery candidate is scored 4 times; {len(chosen)} groups get "
                f"{cfg.sampled_replies} sampled replies per candidate")

    # 1. scores of all groups; the slowest rank's time counts
    measured, seconds = measure(cfg, judge, source, before=judge_before_grpo(judge, trained, settings),
                                groups=groups, others=other_groups(groups, cfg.seed))
    measured = dist.gather_rows(measured).numpy().round(4)        # as in scores.jsonl: noise decides nothing
    seconds = float(dist.gather_rows(torch.tensor([seconds])).max())

    # 2. sampled replies
    replies = None
    if chosen:
        replies, mass = map(dist.gather_rows, sample(cfg, judge, source, groups=[groups[i] for i in chosen],
                                                     max_tokens=settings["max_reply_tokens"]))

    asked = None
    if cfg.pair_model:
        asked = dist.gather_rows(pair_mode.ask(cfg.pair_model, source, [groups[i] for i in chosen], device,
                                               cfg.pair_batch)).numpy()

    # 3. hacking probes of the ground truth; the validation split, which says when two scores are a tie
    with_hr = [group for group in groups if group["hr"]]
    probed = probes.score_all(cfg, judge, source, with_hr) if len(with_hr) > 1 else None
    val, val_labels = load_labeled(source, "val", least=1)
    val_scores = dist.gather_rows(reward_checks.score_split(cfg, judge, source, val)).numpy().round(4)

    # 4. results, and pictures of them
    if dist.is_main():
        maps = run.read_json(trained / "judge" / "calibration.json")
        train, train_labels = load_labeled(source, "train")
        scores = {name: measured[:, :, i] for i, name in enumerate(MEASURED)}
        prior = method_prior(groups, train, train_labels, settings["held_out_methods"])
        train = leave_out(train, settings["held_out_methods"])
        scores["method_prior"] = np.nan_to_num(prior)
        results, texts = evaluate(groups, scores, labels, seed=cfg.seed), {}
        if chosen:
            written, sampled = read_replies(judge, replies)
            texts = {groups[i]["id"]: own for i, own in zip(chosen, written)}
            results["readouts"] = {"digit_mass": round(float(mass.mean()), 4)} | compare_readouts(
                sampled, scores["judge"][chosen], labels.ranks[chosen], seed=cfg.seed)
        if asked is not None:
            own = Labels(labels.ranks[chosen], labels.scores[chosen])
            results["pair_mode"] = pair_mode.compare(asked, scores["judge"][chosen], own, model=cfg.pair_model,
                                                     seed=cfg.seed)
        results |= reward_checks.more(groups, scores["judge"], labels, prior=prior, train=train,
                                      val=(val_scores, val_labels, maps), texts=texts, seed=cfg.seed)
        results["probes"] = probes.probe_rates(probed, cfg.seed)
        costs = reward_checks.costs(judge, source, spread(groups, 24), replies)
        run.write_bytes(folder / "scores.jsonl", score_lines(groups, scores["judge"], texts))
        run.write_bytes(folder / "table.md", reward_tables.markdown(results, costs).encode())
        run.write_bytes(folder / "plot.png", reward_report.plot(results))
        run.write_bytes(folder / "examples.png", examples(cfg, source, groups, labels=labels,
                                                            scores=scores["judge"]))
        if probed is not None:
            write_png(folder / "probes.png", probes.picture(cfg, source, with_hr, probed))
        views = case_views(source, groups, results["cases"])
        run.write_bytes(folder / "report.html", reward_tables.page(folder, results, costs, views))
        run.write_json(folder / "results.json", results)
        run.write_manifest(folder, script=__file__, started=started, inputs=[source, trained],
                           results=headline(results, labels.ranks[..., 0].size / seconds) | costs)
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
