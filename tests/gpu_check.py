"""
What a GPU makes of configs/full.yaml, in at most 8 minutes on a big one: no download, no data, random weights.

A judge with the sizes of Qwen3-VL-4B and a policy with those of the x4-upscaler are built on the device; then steps of
02 and 04 as full.yaml sets them, shared prefixes against plain rows, scores in batches against one image at a time, and
a step again from its checkpoint. Prints a table and writes runs/gpu_check/results.json.

Run     python tests/gpu_check.py               # on a GPU
        python tests/gpu_check.py tiny          # any machine, small sizes: that it starts, 20 s
        python tests/gpu_check.py memory Qwen3-VL-4B    # a CPU with 16 GB: real widths and vocabulary, two layers,
                                                # steps of 02; Qwen2.5-VL-3B, -7B; x4-upscaler: in whole, a step of 04
"""
import json
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLConfig, Qwen2VLImageProcessorPil, Qwen3VLConfig

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]
import plain_rows
from common import dist, mllm, run, sr_pipelines
from common.config import load_config
from common.groups import Cohort
from common.replies import answer_logp, check_shared_prefix
from common.small_mllm import build_tokenizer
from common.training import copied, resume, save_checkpoint, trainable
from conftest import ROOT, load_stage, make_images
from test_sources import save_upscaler

# sizes as in the published config.json
QWEN3_VL_4B = dict(
    text=dict(vocab_size=151936, hidden_size=2560, intermediate_size=9728, num_hidden_layers=36, head_dim=128,
              num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=262144, rope_parameters=dict(
                  rope_type="default", rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True)),
    vision=dict(depth=24, hidden_size=1024, intermediate_size=4096, num_heads=16, patch_size=16, out_hidden_size=2560,
                num_position_embeddings=2304, deepstack_visual_indexes=[5, 11, 17]))
QWEN2_5_VL_3B = dict(
    text=dict(vocab_size=151936, hidden_size=2048, intermediate_size=11008, num_hidden_layers=36,
              num_attention_heads=16, num_key_value_heads=2, max_position_embeddings=128000, rope_parameters=dict(
                  rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])),
    vision=dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, patch_size=14, out_hidden_size=2048,
                window_size=112, fullatt_block_indexes=[7, 15, 23, 31]))
QWEN2_5_VL_7B = dict(
    text=QWEN2_5_VL_3B["text"] | dict(vocab_size=152064, hidden_size=3584, intermediate_size=18944,
                                      num_attention_heads=28, num_key_value_heads=4, num_hidden_layers=28),
    vision=QWEN2_5_VL_3B["vision"] | dict(out_hidden_size=3584), tied=False)
JUDGES = {"Qwen3-VL-4B": (QWEN3_VL_4B, Qwen3VLConfig, 512), "Qwen2.5-VL-3B": (QWEN2_5_VL_3B, Qwen2_5_VLConfig, 448),
          "Qwen2.5-VL-7B": (QWEN2_5_VL_7B, Qwen2_5_VLConfig, 448)}     # the last number: px
SMALL = dict(num_hidden_layers=2, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2,
             vocab_size=1024, head_dim=16, rope_parameters=dict(rope_type="default", rope_theta=1e4,
                                                                mrope_section=[4, 2, 2], mrope_interleaved=True))
TINY = dict(text=SMALL, vision=QWEN3_VL_4B["vision"] | dict(
    depth=2, hidden_size=32, intermediate_size=48, num_heads=2, out_hidden_size=64, num_position_embeddings=16,
    deepstack_visual_indexes=[0, 1]))


def build_judge(sizes: dict, kind: type, device: torch.device) -> mllm.Judge:
    """A frozen bfloat16 judge with random weights, of the class and shape of a published one."""
    tokenizer, patch = build_tokenizer(), sizes["vision"]["patch_size"]
    ids = tokenizer.get_vocab()
    config = kind(text_config=sizes["text"], vision_config=sizes["vision"], tie_word_embeddings=sizes.get("tied", True),
                  image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
                  vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"])
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    processor = Qwen2VLImageProcessorPil(patch_size=patch, merge_size=2, size=dict(shortest_edge=4 * patch**2,
                                                                                  longest_edge=512 * 512))
    return mllm.Judge(model.eval().requires_grad_(False), tokenizer, processor, "resized", "image", device)


def build_cohorts(count: int, side: int, candidates: int) -> list[Cohort]:
    ranks = np.repeat(1.0 + np.arange(candidates)[:, None], 3, 1)
    groups = [make_images(i, side, side, candidates) for i in range(count)]
    return [Cohort(f"c{i}", lr, images, ["hr"] * candidates, ranks, 9 - ranks)
            for i, (lr, *images) in enumerate(groups)]


def timed(device: torch.device, work: Callable) -> dict:
    """Seconds of a second call, and the most memory that it held, GB."""
    work()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    started = dist.clock(device)
    result = work()
    return {"seconds": dist.clock(device) - started, "peak_gb": run.peak_memory_gb(), "result": result}


def judge_steps(cfg, judge: mllm.Judge, cohorts: list[Cohort], folder: Path) -> dict:
    """A step of the cold start, two of GRPO, and the second one again from the checkpoint behind the first."""
    stage = load_stage("02")
    weights = trainable(judge.model)
    optimizers, start, rows = stage.make_optimizers(weights, cfg.lr), copied(weights), []
    cold = stage.supervised_step(judge, cfg, optimizers, cohorts, 0)
    for step in (0, 1, 1):
        if len(rows) == 2:
            resume(folder, weights, optimizers)
        rows.append(stage.grpo_step(judge, start, cfg, optimizers, cohorts, step)[0])
        if step == 0:
            save_checkpoint(folder, 1, weights=weights, optimizers=optimizers, state={})
    keys = ("seconds_sample", "seconds_update", "peak_memory_gb", "ratio_max", "grad_norm")
    return {"loss_direct_of_the_cold_start": float(cold["loss_direct"]), **{key: float(rows[1][key]) for key in keys},
            "grad_norm_resumed": float(rows[2]["grad_norm"])}


def sharing(judge: mllm.Judge, cohort: Cohort, replies: int, tokens: int) -> dict:
    """Loss and gradient of all replies to one LR image: one row with shared prefixes, and plain rows."""
    error, noise = check_shared_prefix(judge, cohort)
    features, grids = mllm.image_features(judge, [[cohort.lr, *cohort.images]])
    texts = [[[judge.digit_ids[(c + k + t) % 9].item() for t in range(tokens)] for k in range(replies)]
             for c in range(len(cohort.images))]

    def gradient() -> torch.Tensor:
        logp, mask, _ = answer_logp(judge, features, grids, [texts], judge.digit_ids.expand(3 * len(texts), -1))
        logp[mask].mean().backward()
        flat = torch.cat([p.grad.flatten() for p in trainable(judge.model).values()])
        judge.model.zero_grad()
        return flat

    shared = timed(judge.device, gradient)
    with plain_rows.plain_rows():
        plain = timed(judge.device, gradient)
    a, b = shared.pop("result").double(), plain.pop("result").double()
    return {"log_probability_error": error, "noise_of_plain_rows": noise,
            "gradient_cosine": float(a @ b / a.norm() / b.norm()), "shared_seconds": shared["seconds"],
            "plain_seconds": plain["seconds"], "shared_peak_gb": shared["peak_gb"], "plain_peak_gb": plain["peak_gb"]}


def throughput(judge: mllm.Judge, cohorts: list[Cohort]) -> dict:
    lrs, images = [cohort.lr for cohort in cohorts], [cohort.images for cohort in cohorts]
    count = sum(map(len, images))
    batch = timed(judge.device, lambda: mllm.expected_scores(judge, lrs, images))["seconds"]
    alone = timed(judge.device, lambda: [mllm.expected_scores(judge, lrs[:1], [[one]]) for one in images[0]])
    alone = alone["seconds"]
    return {"images_per_second": count / batch, "images_per_second_one_at_a_time": len(images[0]) / alone}


def build_upscaler(folder: Path, tiny: bool) -> None:
    """A random x4-upscaler in folder/model, of the published sizes but for its text, which is small."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    save_upscaler(folder)
    if not tiny:
        UNet2DConditionModel(
            in_channels=7, out_channels=4, block_out_channels=(256, 512, 512, 1024), cross_attention_dim=16,
            down_block_types=("DownBlock2D", *["CrossAttnDownBlock2D"] * 3), attention_head_dim=8,
            up_block_types=(*["CrossAttnUpBlock2D"] * 3, "UpBlock2D"), num_class_embeds=1000, sample_size=128,
            only_cross_attention=(True, True, True, False), use_linear_projection=True,
        ).save_pretrained(folder / "model" / "unet")
        AutoencoderKL(block_out_channels=[128, 256, 512], latent_channels=4, layers_per_block=2,
                      down_block_types=["DownEncoderBlock2D"] * 3, up_block_types=["UpDecoderBlock2D"] * 3,
                      scaling_factor=0.08333).save_pretrained(folder / "model" / "vae")


def sr_step(cfg, judge: mllm.Judge, folder: Path, device: torch.device, *, side: int, tiny: bool) -> dict:
    """Seconds of the parts of a step of 04 on cfg.inputs_per_step LR images, and its ratio check."""
    stage, mine = load_stage("04"), dist.mine(list(range(cfg.inputs_per_step)))
    if dist.is_main():
        build_upscaler(folder, tiny)
    dist.barrier()
    sr_pipelines.point_to(folder / "policy", sr_pipelines.Published(
        "upscaler", str(folder / "model"), 4, cfg.denoise_steps, cfg.noise_level))
    policy, reference = stage.with_reference(cfg, sr_pipelines.load_policy(folder / "policy", device))
    lr = torch.rand(cfg.inputs_per_step, 3, side // 4, side // 4, generator=run.generator(0, "lr"))[mine]
    optimizer, times = torch.optim.AdamW(trainable(policy).values(), lr=cfg.lr), [dist.clock(device)]
    policy.eval()
    rollouts = stage.roll_out(policy, cfg, lr.to(device), ids=list(map(str, mine)), step=0)
    times.append(dist.clock(device))
    judged, fidelity = stage.score(judge, cfg, lr, torch.cat([rollout.images for rollout in rollouts]))
    times.append(dist.clock(device))
    policy.train()
    error = stage.check_ratio(policy, cfg, rollouts)
    times.append(dist.clock(device))
    advantages = torch.linspace(-1, 1, judged.numel())                      # random weights earn nothing to learn from
    row = stage.learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer)
    times.append(dist.clock(device))
    parts = ("seconds_sample", "seconds_score", "seconds_ratio_check", "seconds_update")
    return dict(zip(parts, np.diff(times).tolist())) | {
        "ratio_error": error, "grad_norm": float(row["grad_norm"]), "peak_memory_gb": run.peak_memory_gb()}


def main(mode: str = "", name: str = "", out: Path = ROOT / "runs" / "gpu_check") -> dict:
    started, device = time.time(), dist.init()
    folder = out / (name or f"{started:.0f}")
    folder.mkdir(parents=True, exist_ok=True)
    tiny, full = mode == "tiny", [str(ROOT / "configs" / "full.yaml"), "run=unused"]
    reward, sr = (load_config(load_stage(number).Config, load_stage(number).__file__, full) for number in ("02", "04"))
    reward, sr = replace(reward, warmup_steps=1), replace(sr, inputs_per_step=min(4, sr.inputs_per_step))
    sizes, kind, side, count = QWEN3_VL_4B, Qwen3VLConfig, 512, reward.groups_per_step
    if tiny:
        sizes, side, count = TINY, 64, 2
        reward = replace(reward, groups_per_step=2, reasoned_groups=1, replies=2, max_reply_tokens=6, direct_replies=4,
                         cold_start_groups=2, lora_rank=4)
        sr = replace(sr, inputs_per_step=2, samples_per_input=2, denoise_steps=4, window_start=0, window_width=1,
                     lora_rank=4)
    if mode == "memory":
        results = memory(reward, sr, name, folder, device)
        dist.print0(f"{name} {json.dumps(results)}")
        dist.finish()
        shutil.rmtree(folder, ignore_errors=True)
        return results
    judge = build_judge(sizes, kind, device)
    judge = load_stage("02").prepare(reward, judge, lora=True)
    cohorts = build_cohorts(count, side, 6 if not tiny else 2)
    device_name = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    results = {"device": device_name, "sizes": mode or "full",
               "02": judge_steps(reward, judge, cohorts, folder),
               "shared prefixes": sharing(judge, cohorts[0], reward.replies, reward.max_reply_tokens),
               "scores": throughput(judge, cohorts),
               "04": sr_step(sr, judge, folder / "sr", device, side=side, tiny=tiny)}
    results["seconds"] = time.time() - started
    for part, row in results.items():
        for key, value in row.items() if isinstance(row, dict) else [("", row)]:
            print(f"{part:<16} {key:<34} {value:.4g}" if isinstance(value, float) else f"{part:<16} {key:<34} {value}")
    run.write_json(out / "results.json", results)
    shutil.rmtree(folder)
    return results


def memory(reward, sr, name: str, folder: Path, device: torch.device) -> dict:
    """
    Peak memory of steps of 02 on a judge of real widths and vocabulary and two layers, loaded as a hub checkpoint is;
    or of a step of 04 on the x4-upscaler in whole. Batches as small as they can be, under any number of processes.
    """
    count = dist.world_size()
    if name == "x4-upscaler":
        sr = replace(sr, inputs_per_step=count, samples_per_input=2, samples_per_gpu=1, denoise_steps=4)
        return sr_step(sr, build_judge(TINY, Qwen3VLConfig, device), folder, device, side=128, tiny=False)
    sizes, kind, side = JUDGES[name]
    few = {"depth": 2} | ({"deepstack_visual_indexes": [0, 1]} if kind is Qwen3VLConfig else
                          {"fullatt_block_indexes": [1]})
    shape = sizes | {"text": sizes["text"] | {"num_hidden_layers": 2}, "vision": sizes["vision"] | few}
    if dist.is_main():
        mllm.save_model(build_judge(shape, kind, device), folder)
    dist.barrier()
    reward = replace(reward, model=str(folder), groups_per_step=count, reasoned_groups=count, cold_start_groups=count,
                     replies=2, max_reply_tokens=16)
    stage, cohorts = load_stage("02"), build_cohorts(count, side, 5)
    judge = stage.first_judge(reward, cohorts, device)
    grids = mllm.pixel_patches(judge, [[cohorts[0].lr, *cohorts[0].images]])[1]
    parts = {"language": judge.net.model.language_model, "vision": judge.net.model.visual, "judge": judge.model}
    return judge_steps(reward, judge, cohorts, folder) | {
        "prompt_tokens": sum(len(s.ids) for s in mllm.prompt_row(judge, grids[0], grids[1:]))} | {
        f"{part}_gb": sum(p.numel() * p.element_size() for p in module.parameters()) / 2**30
        for part, module in parts.items()}


if __name__ == "__main__":
    main(*sys.argv[1:])
