"""README.md beside a trained judge: what it is, how good, how to use it, what it is not."""
from pathlib import Path

from common import run

SMALL = "a Qwen2.5-VL of about a million weights, built by 02_train_reward.py and trained from nothing"
HOW = {"grpo": "by GRPO from rankings of candidates of one LR image",
       "sft_rank": "by supervised ranking (algorithm sft_rank: soft labels and a fidelity loss)"}
CARD = """---
library_name: transformers
pipeline_tag: image-text-to-text
tags: [super-resolution, reward-model, image-quality]{tag}
---
# Reward model for super-resolution, conditioned on the low-resolution image

Sees the low-resolution (LR) image and one super-resolved candidate; rates consistency with LR, naturalness, and
overall, 1 to 9. Trained {how}, after a supervised cold start.

* Base: {base}; {kind}. Prompt version {prompt_version}; LR shown {lr_view}, candidate as {candidate_view}, at most
  {max_pixels} pixels each.
* Data: {groups} LR images, {candidates} candidates, labels: {label_source}. {cold_start_steps} supervised steps,
  {steps} of {algorithm}.
* Pair accuracy on validation photographs, overall: {before:.3f} before {algorithm}, {after:.3f} after (the best of
  several validations: a little optimistic). 03_eval_reward.py measures it on test photographs.
* calibration.json: per axis a monotone map from the expected score to the scale of the labels, linear between its
  knots and constant outside; fitted on the validation photographs.

Use: `expected_scores` in common/mllm.py of the repository that trained it, or the block "Use the judge elsewhere" of
its README, with transformers and peft alone (for LR shown resized).

Not for images far from the training data. A judge can be fooled: look at what it prefers.
"""


def write(folder: Path, data_stage: Path, settings: dict, *, before: float, after: float) -> None:
    """
    Write README.md into a folder that holds judge.json.

    data_stage: folder of stage 01. settings: those of stage 02. before, after: validation pair accuracies.
    """
    facts, made = (run.read_json(path) for path in (folder / "judge.json", data_stage / "manifest.json"))
    model, rank = settings["model"], settings["lora_rank"]
    kind = f"LoRA of rank {rank} on the language model" if rank else "all weights trained"
    base, tag = (SMALL, "") if model == "small" else (model, f"\nbase_model: {model}")
    text = CARD.format(**{**settings, **facts, **made["results"], "base": base, "tag": tag, "kind": kind,
                          "before": before, "after": after, "how": HOW[settings["algorithm"]]})
    run.write_bytes(folder / "README.md", text.encode())
