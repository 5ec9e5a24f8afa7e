"""
Train the LR-conditioned reward model: supervised cold start, then GRPO on rankings inside each LR group.

A multimodal LLM sees the LR image and one SR candidate, reasons, and scores consistency, naturalness and overall. The
cold start teaches the answer form and a first idea of the scores; no reasons, but to the small model, which knows no
word: templates from the fault's name and the label, which come to carry nothing. For GRPO the model then writes two
kinds of replies to every (LR, candidate): K with reasoning, and K_direct single digits behind the stem of each axis
(the read-out that later stages use). A reply is rewarded for ordering its candidate rightly among the *other candidates
of the same LR*.

What is left out of GRPO here: a second model as the reference (it is the same network, with its trained weights as they
were before GRPO) and a value network. The candidates of an LR image never leave their rank, so nothing depends on the
number of GPUs.

Run     python 02_train_reward.py configs/demo.yaml
        python 02_train_reward.py configs/demo.yaml run=runs/sft cold_start_steps=800 rank_weight=1 steps=0   # no GRPO
        python 02_train_reward.py configs/demo.yaml blind=true          # a judge without LR, for 03 to compare with
        torchrun --standalone --nproc_per_node=8 02_train_reward.py configs/full.yaml
Reads   <run>/01_build_dataset/   groups.jsonl and its images
Writes  <run>/02_train_reward/    cold_start/ (model or adapter before GRPO)  judge/ (best weights)  metrics.jsonl
                                  curves.png  samples.jsonl (sampled replies)  checkpoints/  best.safetensors
                                  manifest.json
        <run>/02_train_reward_blind/    the same with blind=true; both may run at the same time
Expect  on the demo see the results table in README.md

Shapes: a cohort is one LR image with its C candidates; N = sum of C over some cohorts, one prompt for each (LR,
candidate); K replies of at most T tokens; V vocabulary. Tensors [N * 3, ..] go prompt by prompt, axes as in AXES.
"""
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor
from torch.nn.functional import log_softmax
from tqdm import tqdm

from common import dist, grpo, metrics, mllm, report, run
from common.config import fail, load_config
from common.dist import mine
from common.groups import Cohort, all_groups, check_methods, load_cohorts, pick, require_enough
from common.metrics import AXES
from common.mllm import Judge
from common.replies import (Images, answer_logp, check_shared_prefix, encode, encode_images, forward, look_at,
                            sample_replies, token_logp, write_answers)
from common.small_mllm import build_small
from common.training import (Weights, average, copied, cosine, count_bad_steps, drop_checkpoints, named, resume,
                             save_checkpoint, set_lr, swapped, trainable, update)


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    # model -----------------------------------------------------------------------------------------------------
    model: str = "small"                # "small": as below; else a dense Qwen2.5-VL or Qwen3-VL, hub id or folder
    vision_width: int = 96              # small model only, like the next four
    vision_depth: int = 2               # layers of the vision tower
    width: int = 128                    # of the language model
    depth: int = 3                      # its layers
    heads: int = 4                      # of both
    dtype: str = "float32"              # of the weights: float32 or bfloat16; log-probabilities are float32
    max_pixels: int = 4096              # larger images are shrunk to this before the model sees them
    lr_view: str = "resized"            # "resized": LR bicubic to the candidate's size; "native": as it is
    candidate_view: str = "clip"        # "image": as it is; "clip": two frames, resized LR then candidate
    lora_rank: int = 16                 # one LoRA on the language model, of cold start and GRPO (small model: of GRPO
                                        # alone); 0: train all weights
    blind: bool = False                 # a judge that sees plain gray in place of every LR image, all else the same
    # data ------------------------------------------------------------------------------------------------------
    held_out_methods: list[str] = field(default_factory=list)   # candidates of these methods are no part of training
                                        # (of "warp+blur" one part is enough): 03 tests whether it knows better anyway
    looks: int = 48                     # ways to show the training images: 1 as they are, 8 with flips and quarter
                                        # turns, 48 also with the color channels in another order
    # cold start ------------------------------------------------------------------------------------------------
    cold_start_steps: int = 600         # 0 skips it: only for a model that already answers in the asked form
    cold_start_groups: int = 10         # LR groups per step, over all GPUs: changes the result
    cold_start_lr: float = 1e-3         # AdamW
    cold_start_muon_lr: float = 0.02    # small model only: Muon, for the weight matrices between the embeddings
    cold_start_replies: int = 1         # full replies per group and step; the direct answers are always trained
    rank_weight: float = 0.0            # weight of a third loss, on the order of expected scores; 1: a baseline without
                                        # GRPO, as DeQA-Score (arXiv 2501.11561) trains
    # GRPO ------------------------------------------------------------------------------------------------------
    steps: int = 100                    # rollouts, each with updates_per_rollout updates; 0: cold start alone
    groups_per_step: int = 10           # LR groups (G), over all GPUs: changes the result
    reasoned_groups: int = 2            # this many of them get replies with reasoning, which are slow to write
    replies: int = 4                    # replies with reasoning per (LR, candidate), K: changes the result
    direct_replies: int = 32            # single-digit replies per axis, K_direct; they cost almost nothing
    max_reply_tokens: int = 40          # longer replies are cut and then do not parse
    lr: float = 5e-4                    # AdamW
    muon_lr: float = 0.005              # small model without LoRA only: Muon, for the weight matrices
    updates_per_rollout: int = 1        # 1: the ratio is exactly 1 and the clip never acts
    clip_low: float = 0.2               # the ratio counts down to 1 - clip_low
    clip_high: float = 0.28             # and up to 1 + clip_high
    kl_weight: float = 0.01             # KL to the model before GRPO, per token
    format_weight: float = 0.2          # reward of a reply that parses, beside the mean ranking reward (0..1)
    # both ------------------------------------------------------------------------------------------------------
    warmup_steps: int = 10              # until the learning rate is reached; from there a cosine
    ema: float = 0.95                   # decay per step of the averaged weights, which are validated and kept
    groups_per_forward: int = 5         # memory only
    groups_per_rollout: int = 5         # memory only: LR groups that are answered at once; needs less than training
    gradient_checkpointing: bool = False    # memory only: activations are computed again, not kept
    eval_every: int = 25                # steps; validation, and a candidate for the best weights
    save_every: int = 50                # steps; checkpoint to resume from

    def __post_init__(self):
        assert self.replies >= 2, f"replies={self.replies}: a group needs at least 2 replies to compare"
        for name in ("vision_width", "vision_depth", "width", "depth", "heads", "max_pixels", "cold_start_groups",
                     "direct_replies", "max_reply_tokens", "updates_per_rollout", "warmup_steps", "groups_per_forward",
                     "groups_per_rollout", "eval_every", "save_every"):
            assert vars(self)[name] >= 1, f"{name}={vars(self)[name]}: should be at least 1"
        for name in ("lora_rank", "cold_start_steps", "cold_start_muon_lr", "cold_start_replies", "rank_weight",
                     "steps", "muon_lr", "clip_low", "clip_high", "kl_weight", "format_weight"):
            assert vars(self)[name] >= 0, f"{name}={vars(self)[name]}: should be at least 0"
        for name in ("lr", "cold_start_lr"):
            assert vars(self)[name] > 0, f"{name}={vars(self)[name]}: should be above 0"
        assert 0 <= self.ema < 1, f"ema={self.ema}: should be from 0 to below 1"
        assert 1 <= self.reasoned_groups <= self.groups_per_step, "reasoned_groups must be in 1..groups_per_step"
        assert self.width % (2 * self.heads) == 0 and self.vision_width % (4 * self.heads) == 0, \
            f"width must be a multiple of 2 x heads, and vision_width of 4 x heads; heads={self.heads}"
        assert self.dtype in ("float32", "bfloat16"), f"dtype must be float32 or bfloat16, not {self.dtype}"
        mllm.check_views(self.lr_view, self.candidate_view)
        assert self.looks in (1, 8, 48), f"looks={self.looks}: should be 1, 8 or 48"
        assert self.lora_rank or self.dtype == "float32", \
            f"lora_rank=0 trains all weights: dtype={self.dtype} would round its updates away; set dtype=float32"
        assert self.cold_start_steps or self.model != "small", "the small model needs cold_start_steps"


LABEL_SIGMA = 0.6                       # digits; width of the soft label around the target score
REPLY_WEIGHT = 0.3                      # of the replies' tokens beside the soft labels
COLD_START_FINAL_LR, FINAL_LR = 0.3, 0.05   # of the peak, at the last step of the cold start and of GRPO
SCORE_STD_FLOOR = 0.25                  # digits; keeps identical replies from making the ranking reward a step
REWARD_STD_FLOOR = 0.3                  # rewards less their group's mean are divided by its std, or by this if larger
WEIGHT_DECAY, GRAD_NORM = 0.05, 1.0     # of AdamW and Muon; gradients are clipped to this norm
CHOSEN_BY = ("val_mean_accuracy", "val_pair_accuracy")  # the first chooses the weights, the second is told beside
MEANS = ("policy_kl", "ref_kl", "clip_frac_low", "clip_frac_high")      # of grpo_loss, for replies and for digits


# model ---------------------------------------------------------------------------------------------------------

def load_base(cfg: Config, source: str | Path, device: torch.device) -> Judge:
    """All weights frozen, from a transformers folder or hub id."""
    judge = mllm.load_model(source, device, dtype=cfg.dtype, lr_view=cfg.lr_view, candidate_view=cfg.candidate_view,
                            blind=cfg.blind)
    if cfg.max_pixels < judge.processor.size["shortest_edge"]:
        fail(f"max_pixels={cfg.max_pixels}: {source} enlarges images to {judge.processor.size['shortest_edge']} "
             "pixels; give at least that")
    judge.processor.size["longest_edge"] = cfg.max_pixels
    return judge


def add_lora(model: torch.nn.Module, cfg: Config) -> PeftModel:
    """LoRA on every linear layer of the language model; the vision tower stays as it is."""
    torch.manual_seed(run.stable_seed(cfg.seed, "lora"))
    linears = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
    return get_peft_model(model, LoraConfig(r=cfg.lora_rank, lora_alpha=2 * cfg.lora_rank, target_modules=linears))


def prepare(cfg: Config, judge: Judge, *, lora: bool, adapter: Path | None = None) -> Judge:
    """The same judge with all its weights to train, or a LoRA: a new one, which changes nothing yet, or a saved one."""
    if lora:
        judge.model = mllm.with_adapter(judge, adapter, trainable=True) if adapter else add_lora(judge.model, cfg)
    else:
        judge.model.requires_grad_(True)
    if cfg.gradient_checkpointing:
        judge.net.activation_checkpointing_enable({"use_reentrant": False})
    return judge


def first_judge(cfg: Config, train: list[Cohort], device: torch.device) -> Judge:
    """The model at the start of the cold start: the small one with all weights trainable, or a real one with LoRA."""
    if cfg.model != "small":
        return prepare(cfg, load_base(cfg, cfg.model, device), lora=cfg.lora_rank > 0)
    small = build_small(
        [[cohort.lr, *cohort.images] for cohort in train[:200]], device, seed=cfg.seed, width=cfg.width,
        depth=cfg.depth, heads=cfg.heads, vision_width=cfg.vision_width, vision_depth=cfg.vision_depth,
        max_pixels=cfg.max_pixels, lr_view=cfg.lr_view, candidate_view=cfg.candidate_view, blind=cfg.blind)
    return prepare(cfg, small, lora=False)


def check_judge(judge: Judge, cohorts: list[Cohort]) -> None:
    """Stop if the judge would resample images, of one cohort for each size of LR, or if shared prefixes change it."""
    some = {cohort.lr.shape: cohort for cohort in cohorts}.values()
    mllm.check_sizes(judge, {cohort.images[0].shape[:2] for cohort in some},
                     "choose hr_size of stage 01, max_pixels or model so")
    error, noise = check_shared_prefix(judge, cohorts[0])
    dist.print0(f"shared prefixes: {error:.1e} off the log-probabilities of plain rows, whose own noise is {noise:.1e}")


def make_optimizers(weights: Weights, lr: float, muon_lr: float = 0) -> dict[str, torch.optim.Optimizer]:
    """AdamW; with muon_lr, Muon (torch's) for the matrices and AdamW for embeddings, head, filters, norms, biases."""
    matrices = {name: p for name, p in weights.items()
                if muon_lr and p.ndim == 2 and "embed_tokens" not in name and "lm_head" not in name}
    rest = [p for name, p in weights.items() if name not in matrices]
    optimizers = {"adamw": torch.optim.AdamW(rest, lr=lr, weight_decay=WEIGHT_DECAY, betas=(0.9, 0.98))}
    if matrices:
        optimizers["muon"] = torch.optim.Muon(matrices.values(), lr=muon_lr, weight_decay=WEIGHT_DECAY)
    return optimizers


def average_step(cfg: Config, averaged: Weights, weights: Weights, step: int) -> None:
    """The decay rises to cfg.ema, so that the start is soon forgotten."""
    average(averaged, weights, min(cfg.ema, (step + 1) / (step + 10)))


def why_skipped(row: dict) -> str:
    """Why the update of a step was skipped, in words; empty if it was not."""
    if not row["skipped_updates"]:
        return ""
    return f"losses that are not finite: {row['nonfinite_losses']:.0f}, grad_norm {row['grad_norm']:.3g}"


# cold start ----------------------------------------------------------------------------------------------------

def lesson(judge: Judge, cfg: Config, cohort: Cohort, step: int) -> tuple[int, list[list[list[int]]], list[bool]]:
    """
    What a step teaches of a cohort: how it is shown (replies.turned), 0 or 1 reply per candidate, token ids, and which
    tokens of all these replies are taught: all to the small model, form and digits alone to one that can reason.
    """
    rng, count = run.np_rng(cfg.seed, "cold start", step, cohort.id), len(cohort.images)
    look, replies, taught = int(rng.integers(cfg.looks)), [[] for _ in range(count)], []
    for c in sorted(rng.choice(count, min(cfg.cold_start_replies, count), replace=False)):
        if cfg.model == "small":
            ids = judge.encode(mllm.compose_reply(cohort.targets[c], cohort.methods[c]))
            some = [True] * len(ids)
        else:
            ids, some = mllm.form_of_reply(judge, cohort.targets[c])
        replies[c].append(ids)
        taught += some
    return look, replies, taught


def supervised_losses(judge: Judge, cfg: Config, cohorts: list[Cohort], looks: list[int], replies: list,
                      taught: list[list[bool]]) -> Tensor:
    """
    Summed losses [3]: soft labels on digits behind the stems, taught tokens of the replies, order of the candidates.

    One row per LR: its candidates, their stems and replies share the prefix.
    """
    features, grids = encode_images(judge, cohorts, looks)
    behind_stems, hidden, token = forward(judge, features, grids, replies)
    logits = mllm.policy_logits(judge, behind_stems)                                         # [N * 3, V]
    targets = torch.tensor(np.concatenate([c.targets.reshape(-1) for c in cohorts]), device=judge.device)
    known = ~targets.isnan()
    digits = torch.arange(1, 10, device=judge.device)
    soft = (-((digits - targets[known, None]) / LABEL_SIGMA) ** 2 / 2).softmax(-1).float()   # [known, 9]
    direct = -(soft * log_softmax(logits[known], -1)[:, judge.digit_ids]).sum()
    mask = torch.tensor(sum(taught, []), dtype=torch.bool, device=judge.device)                 # [tokens]
    written = -token_logp(judge, hidden[mask], token[mask, None]).sum()
    order = direct.new_zeros(())
    if cfg.rank_weight:
        expected = logits[:, judge.digit_ids].softmax(-1) @ digits.float()                   # [N * 3]
        for cohort, scores in zip(cohorts, expected.split([c.ranks.size for c in cohorts])):
            ranks = torch.tensor(cohort.ranks.T, dtype=torch.float32, device=judge.device)   # [3, C]
            order = order + fidelity_loss(scores.view(-1, 3).T, ranks)
    return torch.stack([direct, written, order])


def fidelity_loss(scores: Tensor, ranks: Tensor) -> Tensor:
    """
    Summed loss over the pairs of candidates with labels; scores and ranks [.., C], rank 1 is best.

    1 - sqrt(p g) - sqrt((1 - p)(1 - g)) with p = Phi((s_i - s_z) / sqrt(2)): the reward of grpo.thurstone with one
    score for each candidate, whose std is taken as 1. Source: DeQA-Score, arXiv 2501.11561; each pair counts once.
    """
    i, z = torch.triu_indices(scores.shape[-1], scores.shape[-1], 1, device=scores.device)
    g = grpo.above(ranks)[..., i, z]                                                         # [.., pairs]
    known = ~g.isnan()
    p, g = torch.special.ndtr((scores[..., i] - scores[..., z]) / 2 ** 0.5)[known], g[known]
    return (1 - (p * g + 1e-8).sqrt() - ((1 - p) * (1 - g) + 1e-8).sqrt()).sum()             # 1e-8: finite slope at 0


def supervised_step(judge: Judge, cfg: Config, optimizers: dict, cohorts: list[Cohort], step: int) -> dict:
    """One update on this rank's cohorts, perhaps none; returns a row of metrics, over all ranks."""
    judge.model.train()
    lessons, counts = [lesson(judge, cfg, cohort, step) for cohort in cohorts], torch.zeros(3)
    for cohort, (_, _, taught) in zip(cohorts, lessons):
        ranked = (~np.isnan(cohort.ranks)).sum(0)                                            # [3] of C
        counts += torch.tensor([(~np.isnan(cohort.targets)).sum(), sum(taught), (ranked * (ranked - 1) // 2).sum()])
    counts = dist.all_sum(counts).clamp(min=1)                                               # terms of the three losses
    weights, sums, bad = torch.tensor([1, REPLY_WEIGHT, cfg.rank_weight]) / counts, torch.zeros(3), 0
    for at in range(0, len(cohorts), cfg.groups_per_forward):
        part = slice(at, at + cfg.groups_per_forward)
        losses = supervised_losses(judge, cfg, cohorts[part], *zip(*lessons[part]))          # [3]
        (losses * weights.to(losses)).sum().backward()
        sums += losses.detach().cpu()
        bad += int(not losses.isfinite().all())
    set_lr(optimizers, min(1, (step + 1) / cfg.warmup_steps) * cosine(step / cfg.cold_start_steps, COLD_START_FINAL_LR))
    norm, skipped = update(trainable(judge.model), optimizers, GRAD_NORM, bad=bad)
    *sums, bad = dist.all_sum(torch.tensor([*sums, bad]))
    row = dict(phase="cold_start", loss_direct=sums[0] / counts[0], loss_reply=sums[1] / counts[1], grad_norm=norm,
               lr=optimizers["adamw"].param_groups[0]["lr"], nonfinite_losses=bad, skipped_updates=skipped)
    return row | ({"loss_rank": sums[2] / counts[2]} if cfg.rank_weight else {})


def cold_start(cfg: Config, folder: Path, judge: Judge, train: list[Cohort], val: list[Cohort]) -> None:
    """Supervised fine-tuning; writes <folder>/model or, with LoRA, <folder>/adapter and, last, done.json."""
    check_judge(judge, train + val)
    dist.barrier()                                              # every rank has seen that there is no done.json yet
    weights = trainable(judge.model)
    averaged = copied(weights)
    optimizers = make_optimizers(weights, cfg.cold_start_lr, cfg.cold_start_muon_lr if cfg.model == "small" else 0)
    first, state = resume(folder, named(policy=weights, averaged=averaged), optimizers)
    run.trim_metrics(folder.parent, first)
    bad = state.get("bad", 0)
    bar = tqdm(range(first, cfg.cold_start_steps), initial=first, total=cfg.cold_start_steps, desc="cold start",
               disable=not dist.is_main())
    for step in bar:
        cohorts = mine(pick(train, cfg.seed, "cold start", step, cfg.cold_start_groups))
        row = supervised_step(judge, cfg, optimizers, cohorts, step)
        average_step(cfg, averaged, weights, step)
        bad = count_bad_steps(bad, why_skipped(row), folder=folder, step=step)
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.cold_start_steps:
            with swapped(weights, averaged):
                row |= evaluate(judge, cfg, val)
            bar.set_postfix(loss=f"{row['loss_direct']:.3f}", val=f"{row['val_pair_accuracy']:.3f}")
        report.log(folder.parent, step, row)
        if (step + 1) % cfg.save_every == 0:
            save_checkpoint(folder, step + 1, weights=named(policy=weights, averaged=averaged), optimizers=optimizers,
                            state={"bad": bad})
    with swapped(weights, averaged):
        if dist.is_main():
            mllm.save_model(judge, folder / ("adapter" if isinstance(judge.model, PeftModel) else "model"))
            run.write_json(folder / "done.json", {"steps": cfg.cold_start_steps})
        dist.barrier()


# GRPO ----------------------------------------------------------------------------------------------------------

@dataclass
class Rollout:                          # what the model wrote about a few cohorts
    cohorts: list[Cohort]
    images: list[Images]                # as they were shown
    digits: Tensor                      # [N * 3, K_direct] token ids written behind the stems
    replies: list[list[list[list[int]]]]    # cohorts x C x K token ids; K is 0 where only digits were asked for


@torch.no_grad()
def sample(judge: Judge, cfg: Config, cohorts: list[Cohort], step: int, reasoned: set[str]) -> list[Rollout]:
    """
    Let the model answer, groups_per_rollout cohorts at a time. reasoned: ids of the cohorts that get replies with
    reasoning, too; they come first, apart from the others, because their rows are long.

    The randomness of an answer depends on (seed, step, LR, candidate, number) alone.
    """
    judge.model.eval()                                                     # rollout and loss must agree: no dropout
    rollouts, n_digits = [], 3 * cfg.direct_replies
    for k in (cfg.replies, 0):
        chosen = [cohort for cohort in cohorts if (cohort.id in reasoned) == (k > 0)]
        for at in range(0, len(chosen), cfg.groups_per_rollout):
            part = chosen[at:at + cfg.groups_per_rollout]
            looks = [int(run.np_rng(cfg.seed, "look", step, cohort.id).integers(cfg.looks)) for cohort in part]
            images = [look_at(judge, cohort, look) for cohort, look in zip(part, looks)]
            uniforms = torch.stack([
                torch.rand(n_digits + cfg.replies * cfg.max_reply_tokens,
                           generator=run.generator(cfg.seed, "answer", step, cohort.id, c))
                for cohort in part for c in range(len(cohort.images))])                         # [N, ..]
            digits, replies = write_answers(
                judge, *encode(judge, images), [len(cohort.images) for cohort in part],
                digits=uniforms[:, :n_digits].reshape(-1, cfg.direct_replies),
                uniforms=uniforms[:, n_digits:].unflatten(1, (cfg.replies, -1))[:, :k])
            by_cohort = digits.split([3 * len(cohort.images) for cohort in part])
            for first in range(0, len(part), cfg.groups_per_forward):           # training takes fewer at once
                some = slice(first, first + cfg.groups_per_forward)
                rollouts.append(Rollout(part[some], images[some], torch.cat(by_cohort[some]), replies[some]))
    return rollouts


def scores_written(judge: Judge, replies: list[list[list[int]]]) -> Tensor:
    """The scores [3, C, K] in replies [C][K], token ids; NaN where a reply does not parse."""
    texts = [[mllm.reply_text(judge, ids) for ids in of_candidate] for of_candidate in replies]
    parsed = [[mllm.parse_reply(text) or dict.fromkeys(AXES, torch.nan) for text in row] for row in texts]
    return torch.tensor([[[float(scores[axis]) for scores in row] for row in parsed] for axis in AXES])


def score(judge: Judge, cfg: Config, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """
    Rewards of the replies [N, K] and of the digits [N * 3, K_direct]; NaN for digits of an axis without labels.

    What does not parse is left out of all ranking statistics; its reward is 0, below that of any reply that parses.
    """
    is_digit = rollout.digits[..., None].cpu() == judge.digit_ids.cpu()                         # [N * 3, K_direct, 9]
    digits = torch.where(is_digit.any(-1), is_digit.float() @ torch.arange(1.0, 10.0), torch.nan)
    reply_rewards, digit_rewards = [], []
    for cohort, replies, direct in zip(rollout.cohorts, rollout.replies,
                                       digits.split([3 * len(cohort.images) for cohort in rollout.cohorts])):
        ranks = torch.tensor(cohort.ranks.T, dtype=torch.float32)                               # [3, C]
        ranking = grpo.thurstone(direct.unflatten(0, (-1, 3)).transpose(0, 1), ranks, SCORE_STD_FLOOR)
        ranking = torch.where(ranks[..., None].isnan(), torch.nan, ranking.nan_to_num(0.0))     # [3, C, K_direct]
        digit_rewards.append(ranking.transpose(0, 1).flatten(0, 1))
        written = scores_written(judge, replies)                                                # [3, C, K]
        ranking = grpo.thurstone(written, ranks, SCORE_STD_FLOOR).nanmean(0).nan_to_num(0.5)    # [C, K]
        reply_rewards.append(torch.where(written[0].isnan(), 0.0, ranking + cfg.format_weight))
    return torch.cat(reply_rewards), torch.cat(digit_rewards)


def advantages_of(rewards: Tensor) -> Tensor:
    """Of rewards [prompts, K] within each prompt; NaN, not trained on, where there is no reward."""
    return grpo.group_advantages(rewards, std_floor=REWARD_STD_FLOOR).masked_fill(rewards.isnan(), torch.nan)


def logp_of(judge: Judge, rollout: Rollout) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities of the replies [N * K, T], their mask, and those of the digits [N * 3, K_direct]."""
    return answer_logp(judge, *encode(judge, rollout.images), rollout.replies, rollout.digits)


def learn(judge: Judge, cfg: Config, rollouts: list[Rollout], advantages: list, *, reference: list,
          sampler: list | None) -> tuple[dict[str, float], list]:
    """
    Backward pass of the GRPO loss over all answers of the step: mean over reply tokens, plus mean over digits.

    advantages, reference, sampler: a pair (replies, digits) for each rollout, advantages [N, K] and [N * 3, K_direct],
    or log-probabilities as in logp_of under the reference and under the model that sampled; sampler None: this one.
    Returns this rank's share of the stats (sums over ranks are means over the step, ratio_max aside), and the
    log-probabilities under the model as it is.
    """
    judge.model.train(judge.net.is_activation_checkpointing)    # in training mode only where transformers demands it
    n_tokens = sum(len(ids) for rollout in rollouts for cohort in rollout.replies for row in cohort for ids in row)
    n_digits = sum(int((~digits.isnan()).sum()) for _, digits in advantages)
    n_tokens, n_digits = dist.all_sum(torch.tensor([n_tokens, n_digits], dtype=torch.float32)).clamp(min=1).tolist()
    limits = dict(clip_low=cfg.clip_low, clip_high=cfg.clip_high, kl_weight=cfg.kl_weight)
    stats = {prefix + name: 0.0 for prefix in ("", "digit_") for name in MEANS}
    stats |= {"nonfinite_losses": 0.0, "ratio_max": 1.0}
    current = []
    for i, rollout in enumerate(rollouts):
        logp, mask, digit_logp = logp_of(judge, rollout)
        current.append((logp.detach(), digit_logp.detach()))
        old_logp, old_digit_logp = (sampler or current)[i]
        ref_logp, ref_digit_logp = reference[i]
        advantage, digit_advantage = (values.to(judge.device) for values in advantages[i])
        digit_mask = ~digit_advantage.isnan()
        loss, digit_stats = grpo.grpo_loss(digit_logp, old_digit_logp, digit_advantage, mask=digit_mask,
                                           ref_logp=ref_digit_logp, denominator=n_digits, **limits)
        add_stats(stats, "digit_", digit_stats, int(digit_mask.sum()), n_digits)
        if len(logp):
            reply_loss, reply_stats = grpo.grpo_loss(logp, old_logp, advantage.flatten(), mask=mask, ref_logp=ref_logp,
                                                     denominator=n_tokens, **limits)
            add_stats(stats, "", reply_stats, int(mask.sum()), n_tokens)
            loss = reply_loss + loss
        stats["nonfinite_losses"] += float(not loss.isfinite())
        loss.backward()
    return stats, current


def add_stats(stats: dict[str, float], prefix: str, part: dict[str, Tensor], count: int, total: float) -> None:
    """Add the means of grpo_loss over `count` of `total` actions of the step."""
    for name in MEANS:
        stats[prefix + name] += float(part[name]) * count / total
    stats["ratio_max"] = max(stats["ratio_max"], float(part["ratio_max"]))


def summary(judge: Judge, cfg: Config, rollouts: list[Rollout], rewards: list[tuple[Tensor, Tensor]]) -> dict:
    """Means and shares over a step's answers on all ranks; each rank has its share of them, perhaps none."""
    replies = torch.cat([torch.zeros(0), *(of_replies.flatten() for of_replies, _ in rewards)])
    digits = torch.cat([torch.zeros(0, cfg.direct_replies), *(of_digits for _, of_digits in rewards)])
    spread = digits.std(1, correction=0)                                   # NaN without a label
    unparsed = sum(int(scores_written(judge, of_cohort)[0].isnan().sum())
                   for rollout in rollouts for of_cohort in rollout.replies)
    no_digit = sum(int((~torch.isin(rollout.digits, judge.digit_ids)).sum()) for rollout in rollouts)
    sums = torch.tensor([replies.nansum(), replies.square().nansum(), digits.nansum(), (spread < 1e-4).sum(), unparsed,
                         no_digit], dtype=torch.float64)
    counts = torch.tensor([len(replies), (~digits.isnan()).sum(), (~spread.isnan()).sum(), digits.numel()])
    total, squares, digit_total, zero, unparsed, no_digit = dist.all_sum(sums).tolist()
    n, n_labeled, n_groups, n_digits = dist.all_sum(counts).clamp(min=1).tolist()
    return dict(reward_mean=total / n, reward_std=max(squares / n - (total / n) ** 2, 0) ** 0.5,
                digit_reward_mean=digit_total / n_labeled, zero_std_groups=zero / n_groups,
                judge_parse_failures=unparsed / n, digit_parse_failures=no_digit / n_digits)


def grpo_step(judge: Judge, reference: Weights, cfg: Config, optimizers: dict, train: list[Cohort],
              step: int) -> tuple[dict, list[dict]]:
    """
    One GRPO step; reference: the trained weights as they were before GRPO.

    Returns a row of metrics, and the first reply to each candidate of one LR image.
    """
    clock, weights = [time.time()], trainable(judge.model)
    cohorts = pick(train, cfg.seed, "grpo", step, cfg.groups_per_step)
    reasoned = {c.id for c in cohorts[::cfg.groups_per_step // cfg.reasoned_groups][:cfg.reasoned_groups]}
    # 1. sample
    rollouts = sample(judge, cfg, mine(cohorts), step, reasoned)
    clock.append(time.time())
    # 2. score
    rewards = [score(judge, cfg, rollout) for rollout in rollouts]
    clock.append(time.time())
    # 3. advantages
    advantages = [(advantages_of(replies), advantages_of(digits)) for replies, digits in rewards]
    # 4. learn
    with torch.no_grad(), swapped(weights, reference):
        of_reference = [logp_of(judge, rollout)[::2] for rollout in rollouts]
    of_sampler, skipped, bad = None, 0, 0.0
    set_lr(optimizers, min(1, (step + 1) / cfg.warmup_steps) * cosine(step / cfg.steps, FINAL_LR))
    for _ in range(cfg.updates_per_rollout):
        stats, current = learn(judge, cfg, rollouts, advantages, reference=of_reference, sampler=of_sampler)
        of_sampler = of_sampler or current
        bad += stats.pop("nonfinite_losses")
        norm, skip = update(weights, optimizers, GRAD_NORM, bad=bad)
        skipped += skip
    clock.append(time.time())
    # 5. log
    ratio_max = float(dist.gather_rows(torch.tensor([stats.pop("ratio_max")])).max())
    stats["nonfinite_losses"] = bad
    sums = dist.all_sum(torch.tensor([*stats.values()], dtype=torch.float64)).tolist()
    row = dict(phase="grpo", **summary(judge, cfg, rollouts, rewards), ratio_max=ratio_max, grad_norm=norm,
               skipped_updates=skipped, lr=optimizers["adamw"].param_groups[0]["lr"], **dict(zip(stats, sums)),
               seconds_sample=clock[1] - clock[0], seconds_score=clock[2] - clock[1],
               seconds_update=clock[3] - clock[2], peak_memory_gb=run.peak_memory_gb())
    examples = []
    if rollouts and rollouts[0].replies[0][0]:
        examples = [{"group": rollouts[0].cohorts[0].id, "candidate": c, "reply": mllm.reply_text(judge, replies[0]),
                     "reward": float(rewards[0][0][c, 0])} for c, replies in enumerate(rollouts[0].replies[0])]
    return row, examples


# evaluate ------------------------------------------------------------------------------------------------------

def evaluate(judge: Judge, cfg: Config, cohorts: list[Cohort]) -> dict[str, float]:
    """
    Pair accuracy of the expected read-out on each axis with pairs; val_mean_accuracy, their mean, chooses the weights.

    val_pair_accuracy is overall's, or the mean where overall has no pairs.
    """
    judge.model.eval()
    share, scores = mine(cohorts), torch.zeros(0, len(cohorts[0].images) * 3)
    if share:                           # without gradient four times as many groups fit
        scores = mllm.expected_scores(judge, [c.lr for c in share], [c.images for c in share],
                                      groups_per_forward=min(16, 4 * cfg.groups_per_forward)).flatten(1)
    scores = dist.gather_rows(scores).view(len(cohorts), -1, 3).numpy()
    results = {axis: metrics.pair_accuracy(scores[:, :, a], [c.ranks[:, a] for c in cohorts])
               for a, axis in enumerate(AXES)}
    accuracy = {axis: value for axis, (value, _, pairs) in results.items() if pairs.any()}
    result, mean = {f"val_{axis}_accuracy": value for axis, value in accuracy.items()}, np.mean([*accuracy.values()])
    return result | {"val_pair_accuracy": accuracy.get("overall", float(mean)), "val_mean_accuracy": float(mean)}


def parse_rate(judge: Judge, cfg: Config, cohorts: list[Cohort]) -> float:
    """Share of sampled replies, one per (LR, candidate), that have the asked form."""
    counts = torch.zeros(2)
    for cohort in mine(cohorts):
        with torch.no_grad():
            features, grids = encode_images(judge, [cohort], [0])
        uniforms = torch.rand(len(cohort.images), 1, cfg.max_reply_tokens,
                              generator=run.generator(cfg.seed, "parse rate", cohort.id))
        scores = scores_written(judge, sample_replies(judge, features, grids, uniforms, [len(cohort.images)]))[0]
        counts += torch.tensor([(~scores.isnan()).sum(), scores.numel()])
    right, total = dist.all_sum(counts).tolist()
    return right / total


# the stage -----------------------------------------------------------------------------------------------------

@run.explained()
def main(cfg: Config) -> None:
    started, device = time.time(), dist.init()
    torch.backends.cuda.matmul.allow_tf32 = cfg.dtype == "bfloat16"     # exact in the head, of bfloat16 values
    folder = Path(cfg.run) / ("02_train_reward_blind" if cfg.blind else "02_train_reward")
    run.open_stage(cfg, __file__, folder, free=mllm.FREE)
    # 1. data
    source = run.require(cfg.run, "01_build_dataset")
    groups = all_groups(source)
    check_methods(source, groups, cfg.held_out_methods)
    train, scale = load_cohorts(source, groups, "train", held_out=cfg.held_out_methods)
    val, _ = load_cohorts(source, groups, "val", scale, cfg.held_out_methods)
    require_enough(len(train), groups_per_step=cfg.groups_per_step * bool(cfg.steps),
                   cold_start_groups=cfg.cold_start_groups * bool(cfg.cold_start_steps))
    size = round(sum(len(cohort.images) for cohort in train) / len(train))
    with_reasoning = size * cfg.reasoned_groups * cfg.replies
    answers = with_reasoning + size * cfg.groups_per_step * 3 * cfg.direct_replies
    dist.print0(f"read {source}: {len(train)} groups of {len(train[0].images)} candidates, {len(val)} for validation\n"
                f"cold start: {cfg.cold_start_steps} steps of {cfg.cold_start_groups} groups\n"
                f"grpo: {cfg.steps} steps of {cfg.groups_per_step} groups; each step writes {answers} answers, "
                f"{with_reasoning} of them with reasoning")

    # 2. cold start
    cold = folder / "cold_start"
    if cfg.cold_start_steps and not (cold / "done.json").exists():
        cold_start(cfg, cold, first_judge(cfg, train, device), train, val)
    drop_checkpoints(cold)

    # 3. the judge to train: a LoRA goes on from the cold start, on the published model; the reference is its start
    base = cold / "model" if (cold / "model").is_dir() else cfg.model
    judge = prepare(cfg, load_base(cfg, base, device), lora=cfg.lora_rank > 0,
                    adapter=cold / "adapter" if (cold / "adapter").is_dir() else None)
    check_judge(judge, train + val)
    weights = trainable(judge.model)
    averaged, reference = copied(weights), copied(weights)
    optimizers = make_optimizers(weights, cfg.lr, cfg.muon_lr if cfg.model == "small" and not cfg.lora_rank else 0)
    first, state = resume(folder, named(policy=weights, averaged=averaged), optimizers)
    if not state:
        found = {key: value for key, value in evaluate(judge, cfg, val).items() if key in CHOSEN_BY}
        state = {"cold_start": found, "best": found, "best_step": 0, "bad": 0, "seconds": 0.0}
        if dist.is_main():
            run.save_tensors(folder / "best.safetensors", weights)
    run.trim_metrics(folder, cfg.cold_start_steps + first)
    run.trim_metrics(folder, first, "samples.jsonl")
    dist.print0(f"before grpo: validation pair accuracy {state['cold_start']['val_pair_accuracy']:.3f}")

    # 4. GRPO
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc="grpo", disable=not dist.is_main())
    for step in bar:
        row, examples = grpo_step(judge, reference, cfg, optimizers, train, step)
        average_step(cfg, averaged, weights, step)
        state["bad"] = count_bad_steps(state["bad"], why_skipped(row), folder=folder, step=cfg.cold_start_steps + step)
        state["seconds"] += sum(value for key, value in row.items() if key.startswith("seconds"))
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            with swapped(weights, averaged):
                row |= evaluate(judge, cfg, val)
                if row["val_mean_accuracy"] > state["best"]["val_mean_accuracy"]:
                    state |= {"best": {key: row[key] for key in CHOSEN_BY}, "best_step": step + 1}
                    if dist.is_main():
                        run.save_tensors(folder / "best.safetensors", weights)
            bar.set_postfix(val=f"{row['val_pair_accuracy']:.3f}")
        report.log(folder, cfg.cold_start_steps + step, row)
        for example in examples:                                # read these to see what the model writes
            run.log_metrics(folder, step, example, "samples.jsonl")
        if (step + 1) % cfg.save_every == 0:
            save_checkpoint(folder, step + 1, weights=named(policy=weights, averaged=averaged), optimizers=optimizers,
                            state=state)

    # 5. the best weights become the judge
    dist.barrier()                                              # best.safetensors is whole
    with torch.no_grad():
        for name, tensor in run.load_tensors(folder / "best.safetensors").items():
            weights[name].copy_(tensor)
    rate = parse_rate(judge, cfg, val)
    if dist.is_main():
        mllm.save_judge(judge, folder / "judge", base=base)
    run.write_manifest(folder, script=__file__, started=started, inputs=[source], results={
        **{f"{key}_cold_start": round(value, 4) for key, value in state["cold_start"].items()},
        **{key: round(value, 4) for key, value in state["best"].items()},
        "best_step": state["best_step"], "parse_rate": round(rate, 4),
        "samples_per_second": round(cfg.steps * answers / max(state["seconds"], 1e-9), 1)})
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
