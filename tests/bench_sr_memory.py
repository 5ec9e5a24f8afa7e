"""
Peak memory of one update of stage 04 on a CPU, for its memory settings.

Run     python tests/bench_sr_memory.py                 # some minutes; Linux
Writes  runs/bench/sr_memory.json

A UNet of 2.1 million weights from nothing, LR 32 x 32 px, 16 samples, 2 random steps of 5. Each row is a process of its
own: `peak` is how far its resident memory rose above where it was before the update (after one update, so that the
optimizer's moments are there).
"""
import ctypes
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch

from conftest import ROOT, load_stage

from common import grpo, run, sr_policy
from common.groups import image_batch
from common.images import write_png
from common.training import trainable

ROWS = [{"lora_rank": rank, "samples_per_gpu": size, "gradient_checkpointing": checkpointing}
        for rank in (16, 0) for size in (16, 4) for checkpointing in (False, True)]


def resident(which: str) -> float:
    """Resident memory of this process in MB: VmRSS now, VmHWM its peak."""
    text = Path("/proc/self/status").read_text()
    return int(text.split(f"{which}:")[1].split()[0]) / 1024


def measure(changes: dict) -> dict:
    """One update in this process."""
    stage = load_stage("04")
    cfg = stage.Config(run="unused", inputs_per_step=2, samples_per_input=8, window_width=2,
                       **changes)
    with tempfile.TemporaryDirectory() as folder:
        rng, groups = np.random.default_rng(0), [{"scale": 4, "hr": "hr.png", "lr": "lr.png"}] * 2
        for name, side in (("hr", 128), ("lr", 32)):
            write_png(Path(folder) / f"{name}.png", rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        lr, hr = (image_batch(Path(folder), groups, key) for key in ("lr", "hr"))
    sampler = sr_policy.Sampler(4, cfg.denoise_steps, sr_policy.zero_terminal_betas(), 0.1, cfg.gain, 48, 6)
    unet = sr_policy.new_unet([64, 96], scale=4, side=lr.shape[-1])
    policy = sr_policy.Policy(unet, sr_policy.Regressor(4, 48, 6), sampler)
    policy, reference = stage.with_reference(cfg, policy.eval().requires_grad_(False))
    optimizer = torch.optim.AdamW(trainable(policy).values(), lr=1e-4)
    rollouts = stage.roll_out(policy, cfg, lr, ids=["a", "b"], step=0)
    advantages = grpo.group_advantages(torch.arange(16.0).view(2, 8)).flatten()
    for _ in range(2):
        ctypes.CDLL("libc.so.6").malloc_trim(0)                     # or freed memory would hide what is used again
        Path("/proc/self/clear_refs").write_text("5")               # forget the peak
        before, started = resident("VmRSS"), time.perf_counter()
        stage.learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages, optimizer=optimizer)
        seconds = time.perf_counter() - started
    return changes | {"peak_mb": round(resident("VmHWM") - before), "seconds": round(seconds, 2),
                      "weights": sum(p.numel() for p in policy.unet.parameters())}


def main() -> None:
    rows = []
    heads = (("trained", 8), ("samples_per_gpu", 16), ("checkpointing", 14), ("peak, MB", 9), ("seconds", 8))
    print(" ".join(f"{name:>{width}}" for name, width in heads))
    for changes in ROWS:
        command = [sys.executable, __file__, json.dumps(changes)]
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
        row = json.loads(done.stdout.splitlines()[-1])
        rows.append(row)
        print(f"{'LoRA' if row['lora_rank'] else 'all':>8} {row['samples_per_gpu']:>16} "
              f"{'yes' if row['gradient_checkpointing'] else 'no':>14} {row['peak_mb']:>9} "
              f"{row['seconds']:>8}", flush=True)
    out = ROOT / "runs" / "bench" / "sr_memory.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    run.write_json(out, rows)


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(sys.argv[1])))) if len(sys.argv) > 1 else main()
