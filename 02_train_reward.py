"""
Train the LR-conditioned reward model: supervised cold start, then GRPO on rankings inside each LR group.

A multimodal LLM sees the LR image and one SR candidate, reasons, and scores consistency, naturalness and overall. The
cold start teaches the answer form and a first idea of the scores. GRPO then lets the model write two kinds of replies
for every (LR, candidate): K with reasoning, and K_direct single digits behind the stem of each axis (the read-out that
later stages use). A reply is rewarded for ordering its candidate rightly among the *other candidates of the same LR*.
With algorithm=sft_rank a supervised baseline takes GRPO's place: same groups, steps, validation and outputs.

What is left out of GRPO here: a second model as the reference (with LoRA it is the same network, adapter off) and a
value network. A cohort never leaves its rank, so its statistics do not depend on the number of GPUs.

Run     python 02_train_reward.py configs/demo.yaml
        python 02_train_reward.py configs/demo.yaml run=runs/sft algorithm=sft_rank
        python 02_train_reward.py configs/full.yaml merge=true          # of a finished run: one model, no adapter
        torchrun --standalone --nproc_per_node=8 02_train_reward.py configs/full.yaml
Reads   <run>/01_build_dataset/   groups.jsonl and its images
Writes  <run>/02_train_reward/    cold_start/ (model before GRPO)  judge/ (best weights, calibration, card; merged/)
                                  metrics.jsonl  samples.jsonl (sampled replies)  checkpoints/  best.safetensors
                                  curves.png  manifest.json
Expect  on the demo see the results table in README.md
"""
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm

from common import calibration, checkpoints, dist, mllm, model_card, report, run, sharding
from common.cohorts import evaluate, scores_of
from common.config import fail, load_config
from common.dist import mine
from common.groups import Cohort, check_methods, label_arrays, load_cohorts, load_groups, pick, require_enough
from common.mllm import Judge
from common.replies import sample_answers
from common.reward_grpo import advantages, learn, score
from common.reward_summary import parse_rate, summary
from common.small_mllm import build_small
from common.supervised import sft_rank_step, supervised_step
from common.reward_training import (average, copy_of, count_bad, drop_nonfinite, holding, load_weights, optimizers, resume,
                             save_best, save_checkpoint, trainable, update)


@dataclass
class Config:
    run: str                            # folder shared by the five stages
    seed: int = 0
    # model -----------------------------------------------------------------------------------------------------
    model: str = "small"                # "small": as below; else a dense Qwen2.5-VL or Qwen3-VL, hub id or folder
    vision_width: int = 96              # small model only, like the next five
    vision_depth: int = 2               # layers of the vision tower
    width: int = 128                    # of the language model
    depth: int = 3                      # its layers
    heads: int = 4                      # of both
    patch: int = 8                      # px; the language model sees one token per 2 x 2 patches
    dtype: str = "float32"              # of the weights: float32 or bfloat16; log-probabilities are float32
    max_pixels: int = 4096              # larger images are shrunk to this before the model sees them
    lr_view: str = "resized"            # "resized": LR bicubic to the candidate's size; "native": as it is
    candidate_view: str = "clip"        # "image": as it is; "clip": two frames, resized LR then candidate
    # cold start ------------------------------------------------------------------------------------------------
    cold_start_steps: int = 600         # 0 skips it: only for a model that already answers in the asked form
    cold_start_groups: int = 10         # LR groups per step, over all GPUs: changes the result
    cold_start_lr: float = 1e-3         # AdamW
    cold_start_muon_lr: float = 0.02    # small model only: Muon, for the weight matrices between the embeddings
    cold_start_final_lr: float = 0.3    # of the peak, at the last step; GRPO brings it down to 0.05 of its own peak
    cold_start_replies: int = 1         # full replies per group and step; the direct answers are always trained
    label_sigma: float = 0.6            # digits; width of the soft label around the target score
    # GRPO ------------------------------------------------------------------------------------------------------
    held_out_methods: list[str] = field(default_factory=list)   # candidates of these methods are no part of training
                                        # (of "warp+blur" one part is enough): 03 tests whether it knows better anyway
    algorithm: str = "grpo"             # "grpo"; "sft_rank": supervised baseline, soft labels and a rank loss
    rank_weight: float = 1.0            # sft_rank only: weight of the rank loss beside the soft labels
    steps: int = 100                    # updates of the weights by GRPO or sft_rank
    groups_per_step: int = 10           # LR groups (G), over all GPUs: changes the result
    reasoned_groups: int = 2            # this many of them get replies with reasoning, which are slow to write
    replies: int = 4                    # replies with reasoning per (LR, candidate), K: changes the result
    direct_replies: int = 32            # single-digit replies per axis, K_direct; they cost almost nothing
    max_reply_tokens: int = 40          # longer replies are cut and then do not parse
    lr: float = 5e-4                    # AdamW
    muon_lr: float = 0.005              # small model without LoRA only: Muon, for the weight matrices
    lora_rank: int = 16                 # on the language model; 0: train all weights, reference a frozen copy
    updates_per_rollout: int = 1        # 1: the ratio is exactly 1 and the clip never acts
    clip_low: float = 0.2               # the ratio counts down to 1 - clip_low
    clip_high: float = 0.28             # and up to 1 + clip_high
    kl_weight: float = 0.01             # KL to the model before GRPO, per token
    ranking: str = "thurstone"          # reward: "thurstone", "margin" (score gaps as labeled), "pairwise" (counts)
    score_std_floor: float = 0.25       # thurstone: digits; keeps identical replies from making the reward a step
    margin_width: float = 1.0           # margin: digits; an error of the gap by this earns exp(-1/2)
    format_weight: float = 0.2          # reward of a reply that parses, beside the mean ranking reward (0..1)
    overlong_weight: float = 0.0        # taken off the reward of a reply of max_reply_tokens; 0: no such penalty
    overlong_tokens: int = 16           # it grows linearly over this many last tokens
    axis_credit: bool = False           # a score's token in a reasoned reply is paid by its own axis, not by the mean
    advantage_std: str = "group"        # rewards less their prompt's mean are divided by the std of their "group" (the
                                        # prompt), of the whole "batch", or by 1 ("none": Dr. GRPO)
    reward_std_floor: float = 0.3       # or, if larger than that std, by this
    min_reward_std: float = 0.0         # prompts whose rewards spread less are dropped with their KL; 0: none
    loss_mean: str = "tokens"           # over all "tokens" (DAPO); over "replies" of their mean (GRPO); "constant":
                                        # over replies * max_reply_tokens (Dr. GRPO)
    direct_weight: float = 1.0          # weight of the direct replies' loss beside the reasoned replies' loss
    # both ------------------------------------------------------------------------------------------------------
    looks: int = 48                     # ways to show the training images: 1 as they are, 8 with flips and quarter
                                        # turns, 48 also with the color channels in another order
    warmup_steps: int = 10              # until the learning rate is reached
    weight_decay: float = 0.05          # of AdamW and Muon
    grad_norm: float = 1.0              # gradients are clipped to this norm
    ema: float = 0.95                   # decay per step of the averaged weights, which are validated and kept
    groups_per_forward: int = 5         # memory only
    gradient_checkpointing: bool = False    # memory only: activations are computed again, not kept
    eval_every: int = 25                # steps; validation, and a candidate for the best weights
    save_every: int = 50                # steps; checkpoint to resume from
    fsdp: bool = False                  # memory only: lora_rank=0 under torchrun: model, reference, AdamW in shards
    merge: bool = False                 # LoRA: also write judge/merged/, one model without adapter; at any time later

    def __post_init__(self):
        assert self.replies >= 2, f"replies={self.replies}: a group needs at least 2 replies to compare"
        for name in ("cold_start_groups", "direct_replies", "max_reply_tokens", "updates_per_rollout", "warmup_steps",
                     "groups_per_forward", "eval_every", "save_every"):
            assert vars(self)[name] >= 1, f"{name}={vars(self)[name]}: should be at least 1"
        assert 1 <= self.reasoned_groups <= self.groups_per_step, "reasoned_groups must be in 1..groups_per_step"
        assert self.width % self.heads == 0 and self.vision_width % self.heads == 0, "heads must divide both widths"
        for name, known in (("algorithm", ("grpo", "sft_rank")), ("ranking", ("thurstone", "margin", "pairwise")),
                            ("advantage_std", ("group", "batch", "none")), ("dtype", ("float32", "bfloat16")),
                            ("loss_mean", ("tokens", "replies", "constant"))):
            assert vars(self)[name] in known, f"{name} must be one of {', '.join(known)}, not {vars(self)[name]}"
        assert not self.overlong_weight or 1 <= self.overlong_tokens <= self.max_reply_tokens, \
            f"overlong_tokens={self.overlong_tokens} must be in 1..max_reply_tokens"
        assert self.margin_width > 0, f"margin_width={self.margin_width}: it is a width, so more than 0"
        assert self.looks in (1, 8, 48), f"looks={self.looks}: should be 1, 8 or 48"
        assert self.lora_rank or self.dtype == "float32", \
            f"lora_rank=0 trains all weights: dtype={self.dtype} would round its updates away; set dtype=float32"
        assert not (self.fsdp and self.lora_rank), "fsdp is for training all weights: set lora_rank=0 or fsdp=false"
        assert not (self.fsdp and self.model == "small" and self.cold_start_muon_lr + self.muon_lr), \
            "fsdp trains with AdamW alone: set cold_start_muon_lr=0 muon_lr=0"
        assert self.lora_rank or not self.merge, "merge: without LoRA (lora_rank=0) judge/model is one model already"
        assert self.cold_start_steps or self.model != "small", "the small model needs cold_start_steps"


# model ---------------------------------------------------------------------------------------------------------

def load_base(cfg: Config, source: str | Path, device: torch.device) -> Judge:
    """All weights frozen, from a transformers folder or hub id."""
    judge = mllm.load_model(source, device, dtype=cfg.dtype, lr_view=cfg.lr_view, candidate_view=cfg.candidate_view)
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


def trainable_judge(cfg: Config, judge: Judge, *, lora: bool) -> Judge:
    """The same, with an adapter or all its weights to train."""
    if lora:
        judge.model = add_lora(judge.model, cfg)
    else:
        judge.model.requires_grad_(True)
    if cfg.gradient_checkpointing:
        judge.net.activation_checkpointing_enable({"use_reentrant": False})
    return judge


# cold start ----------------------------------------------------------------------------------------------------

def cold_start(cfg: Config, folder: Path, judge: Judge, train: list[Cohort], val: list[Cohort]) -> None:
    """Supervised fine-tuning; writes cold_start/model and, last, cold_start/done.json."""
    cold = folder / "cold_start"
    if cfg.fsdp:
        sharding.shard(judge)
    chosen = optimizers(judge, cfg.cold_start_lr, cfg.weight_decay,
                        muon_lr=cfg.cold_start_muon_lr if cfg.model == "small" else None)
    averaged = copy_of(judge)
    first, state = resume(judge, averaged, chosen, cold)
    run.trim_metrics(folder, first)
    bad = state.get("bad", 0)
    bar = tqdm(range(first, cfg.cold_start_steps), initial=first, total=cfg.cold_start_steps, desc="cold start",
               disable=not dist.is_main())
    for step in bar:
        cohorts = mine(pick(train, cfg.seed, "cold start", step, cfg.cold_start_groups))
        row = supervised_step(judge, cfg, chosen, cohorts, phase="cold start", step=step, steps=cfg.cold_start_steps,
                              final_lr=cfg.cold_start_final_lr)
        average(averaged, judge, decay=cfg.ema, step=step)
        bad = count_bad(bad, row, cold, step)
        row = {"phase": "cold_start"} | {key: value for key, value in row.items() if key != "loss_rank"}
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.cold_start_steps:
            with holding(judge, averaged):
                row |= evaluate(judge, val, cfg.groups_per_forward)
            bar.set_postfix(loss=f"{row['loss_direct']:.3f}", val=f"{row['val_pair_accuracy']:.3f}")
        report.log(folder, step, row)
        if (step + 1) % cfg.save_every == 0:
            save_checkpoint(judge, averaged, chosen, cold, step=step + 1, state={"bad": bad})
    load_weights(judge, averaged)
    weights = sharding.whole(trainable(judge), main_only=True)
    if dist.is_main():
        if cfg.fsdp:                                            # transformers cannot save from shards
            load_weights(judge := first_judge(cfg, train, torch.device("cpu")), weights)
        judge.model = judge.model.merge_and_unload() if isinstance(judge.model, PeftModel) else judge.model
        mllm.save_model(judge, cold / "model")
        run.write_json(cold / "done.json", {"steps": cfg.cold_start_steps})
    dist.barrier()


# GRPO ----------------------------------------------------------------------------------------------------------

def grpo_step(judge: Judge, reference: Judge, cfg: Config, chosen: dict, train: list[Cohort], step: int) -> tuple:
    """One GRPO step; returns a row of metrics and a few sampled replies."""
    clock = [time.time()]
    everyone = pick(train, cfg.seed, "grpo", step, cfg.groups_per_step)
    reasoned = {c.id for c in everyone[::cfg.groups_per_step // cfg.reasoned_groups][:cfg.reasoned_groups]}
    # 1. sample
    judge.model.eval()                                                     # rollout and loss must agree: no dropout
    with sharding.gathered(judge):
        answers = sample_answers(judge, cfg, mine(everyone), step, reasoned)
    clock.append(time.time())
    # 2. score
    for item in answers:
        score(judge, cfg, item)
    bad_rewards = sum(map(drop_nonfinite, answers))
    clock.append(time.time())
    # 3. advantages
    advantages(judge, cfg, answers)
    # 4. update
    old, skipped, bad_losses = {}, 0, 0.0
    for _ in range(cfg.updates_per_rollout):
        stats = learn(judge, reference, cfg, answers, old)
        bad_losses += stats.pop("nonfinite_losses")
        norm, skip = update(judge, chosen, cfg.grad_norm, bad=bad_rewards + bad_losses, progress=step / cfg.steps,
                            warmup=(step + 1) / cfg.warmup_steps, final_lr=0.05)
        skipped += skip
    sharding.reshard(reference)
    clock.append(time.time())
    # 5. log
    ratio_max = float(dist.gather_rows(torch.tensor([stats.pop("ratio_max")])).max())
    stats |= {"nonfinite_losses": bad_losses, "nonfinite_rewards": bad_rewards}
    sums = dist.all_sum(torch.tensor([*stats.values()], dtype=torch.float64)).tolist()
    row = dict(phase="grpo", **summary(judge, cfg, answers), ratio_max=ratio_max, grad_norm=norm,
               skipped_updates=skipped, lr=chosen["adamw"].param_groups[0]["lr"], **dict(zip(stats, sums)),
               seconds_sample=clock[1] - clock[0], seconds_score=clock[2] - clock[1],
               seconds_update=clock[3] - clock[2], peak_memory_gb=run.peak_memory_gb())
    examples = [{"group": item.cohort.id, "candidate": c, "reply": own[0], "reward": float(item.reply_rewards[c, 0])}
                for item in answers if item.replies[0] for c, own in enumerate(item.texts)][:6]
    return row, examples


# the stage -----------------------------------------------------------------------------------------------------

def first_judge(cfg: Config, train: list[Cohort], device: torch.device) -> Judge:
    """The model at the start of the cold start: the small one with all weights trainable, or a real one with LoRA."""
    if cfg.model == "small":
        small = build_small(cfg, [[cohort.lr, *cohort.images] for cohort in train[:200]], device)
        return trainable_judge(cfg, small, lora=False)
    return trainable_judge(cfg, load_base(cfg, cfg.model, device), lora=cfg.lora_rank > 0)


def keep_judge(cfg: Config, judge: Judge, folder: Path, *, base: str | Path, source: Path, val: list[Cohort],
               state: dict) -> None:
    """Write judge/: weights, prompt, the calibration fitted on validation, and the model card."""
    scores = scores_of(judge, val, cfg.groups_per_forward).round(4)
    if dist.is_main():
        mllm.save_judge(judge, folder / "judge", base=base)
        labels = label_arrays([group for group in load_groups(source, "val") if group["labels"]])
        labels.scores[np.isnan(np.stack([cohort.ranks for cohort in val]))] = np.nan        # held_out_methods
        run.write_json(folder / "judge" / "calibration.json", calibration.calibrate(scores, labels))
        model_card.write(folder / "judge", source, asdict(cfg), before=state["cold_start"], after=state["best"])


def save_merged(stage: Path) -> None:
    """judge/merged/ of a finished stage 02: base and adapter as one model, for tools that know no adapters."""
    merged, judge = stage / "judge" / "merged", mllm.load_judge(stage, torch.device("cpu"))         # a GPU may be full
    judge.model = judge.model.merge_and_unload()
    partial = merged.with_suffix(".partial")
    mllm.save_model(judge, partial)
    partial.rename(merged)
    print(f"wrote {merged}")


@run.explained()
def main(cfg: Config) -> None:
    started, device = time.time(), dist.init()
    to_merge = cfg.merge and not (Path(cfg.run) / Path(__file__).stem / "judge" / "merged").exists()
    free = ("groups_per_forward", "gradient_checkpointing", "save_every", "merge", "fsdp")
    folder = run.open_stage(cfg, __file__, go_on=to_merge, free=free)
    if (folder / "manifest.json").exists():
        if dist.is_main():
            save_merged(folder)
        return dist.finish()
    if cfg.fsdp and min(cfg.cold_start_groups, cfg.groups_per_step) < dist.world_size():
        fail(f"fsdp: {dist.world_size()} processes are more than cold_start_groups={cfg.cold_start_groups} or "
                 f"groups_per_step={cfg.groups_per_step}, but each needs a group: start fewer")
    source = run.require(cfg.run, "01_build_dataset")
    check_methods(source, cfg.held_out_methods)
    train, scale = load_cohorts(source, "train", held_out=cfg.held_out_methods)
    require_enough(len(train), groups_per_step=cfg.groups_per_step,
                   cold_start_groups=cfg.cold_start_groups * bool(cfg.cold_start_steps))
    val, _ = load_cohorts(source, "val", scale, cfg.held_out_methods)
    size = round(sum(len(c.images) for c in train) / len(train))
    per_step = size * (cfg.reasoned_groups * cfg.replies + cfg.groups_per_step * 3 * cfg.direct_replies)
    work = f"writes {per_step} answers, {size * cfg.reasoned_groups * cfg.replies} of them with reasoning"
    if cfg.algorithm == "sft_rank":
        per_step = size * cfg.groups_per_step * 3
        work = f"fits {per_step} scores"
    dist.print0(f"read {source}: {len(train)} groups of {len(train[0].images)} candidates, {len(val)} for validation\n"
                f"cold start: {cfg.cold_start_steps} steps of {cfg.cold_start_groups} groups\n"
                f"{cfg.algorithm}: {cfg.steps} steps of {cfg.groups_per_step} groups; each step {work}")

    base = cfg.model
    if cfg.cold_start_steps:
        base = folder / "cold_start" / "model"
        if not (folder / "cold_start" / "done.json").exists():
            cold_start(cfg, folder, first_judge(cfg, train, device), train, val)
        checkpoints.drop_checkpoints(folder / "cold_start")
    lora = cfg.lora_rank > 0                                    # its reference: the same with the adapter off
    judge = reference = trainable_judge(cfg, load_base(cfg, base, device), lora=lora)
    if not lora:
        reference = load_base(cfg, base, device) if cfg.algorithm == "grpo" else None
    if cfg.fsdp:
        for each in filter(None, (judge, reference)):
            sharding.shard(each)

    chosen = optimizers(judge, cfg.lr, cfg.weight_decay,
                        muon_lr=cfg.muon_lr if cfg.model == "small" and not cfg.lora_rank else None)
    averaged = copy_of(judge)
    first, state = resume(judge, averaged, chosen, folder)
    if not state:
        with sharding.gathered(judge):
            accuracy = evaluate(judge, val, cfg.groups_per_forward)["val_pair_accuracy"]
        state = {"cold_start": accuracy, "best": accuracy, "best_step": 0, "bad": 0, "seconds": 0.0}
        save_best(judge, folder)
    run.trim_metrics(folder, cfg.cold_start_steps + first)
    run.trim_metrics(folder, first, "samples.jsonl")
    dist.print0(f"before {cfg.algorithm}: validation pair accuracy {state['cold_start']:.3f}")
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc=cfg.algorithm, disable=not dist.is_main())
    for step in bar:
        if cfg.algorithm == "grpo":
            row, examples = grpo_step(judge, reference, cfg, chosen, train, step)    # 1. to 5.
        else:
            row, examples = sft_rank_step(judge, cfg, chosen, train, step), []       # no samples: 4. and 5.
        average(averaged, judge, decay=cfg.ema, step=step)
        state["bad"] = count_bad(state["bad"], row, folder, cfg.cold_start_steps + step)
        state["seconds"] += sum(value for key, value in row.items() if key.startswith("seconds"))
        # 6. evaluate and save
        if (step + 1) % cfg.eval_every == 0 or step + 1 == cfg.steps:
            with holding(judge, averaged):
                row |= evaluate(judge, val, cfg.groups_per_forward)
                if row["val_pair_accuracy"] > state["best"]:
                    state |= {"best": row["val_pair_accuracy"], "best_step": step + 1}
                    save_best(judge, folder)
            bar.set_postfix(val=f"{row['val_pair_accuracy']:.3f}")
        report.log(folder, cfg.cold_start_steps + step, row)
        for example in examples:                                # read these to see what the model writes
            run.log_metrics(folder, step, example, "samples.jsonl")
        if (step + 1) % cfg.save_every == 0:
            save_checkpoint(judge, averaged, chosen, folder, step=step + 1, state=state)

    dist.barrier()                                              # best.safetensors is whole
    if cfg.fsdp:                                                # no shards from here on
        judge = trainable_judge(cfg, load_base(cfg, base, device), lora=lora)
    load_weights(judge, run.load_tensors(folder / "best.safetensors"))
    rate = parse_rate(judge, cfg, val)
    keep_judge(cfg, judge, folder, base=base, source=source, val=val, state=state)
    run.write_manifest(folder, script=__file__, started=started, inputs=[source], results={
        "val_pair_accuracy_cold_start": round(state["cold_start"], 4), "val_pair_accuracy": round(state["best"], 4),
        "best_step": state["best_step"], "parse_rate": round(rate, 4),
        "samples_per_second": round(cfg.steps * per_step / max(state["seconds"], 1e-9), 1)})
    if to_merge and dist.is_main():
        save_merged(folder)
    dist.finish()


if __name__ == "__main__":
    main(load_config(Config, __file__))
