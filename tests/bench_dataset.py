"""
How fast stage 01 degrades, beside a plain loop over images, and what more cores give.

Run     python tests/bench_dataset.py [IMAGES]          # two cores: 3 minutes for the default of 128
Writes  runs/bench/dataset.json

`plain`: read the photograph, cut, degrade, write, one image after another in one process. `1 worker`, `N workers`: the
stage's own jobs, which read a photograph once for many crops. The photographs are those of the demo; a rate is the best
of three; starting the processes (3 s, once a run) is not counted.
"""
import json
import os
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))

from conftest import ROOT, load_stage

from common import jobs, photos

SIZES = (("realesrgan", 512, 1), ("mild", 64, 8))    # as in configs/full.yaml, in configs/demo.yaml; times IMAGES


def cut(values: dict, job: dict) -> dict:
    """Stage 01's job, for worker processes, which know the stage by its file only."""
    stage = load_stage("01")
    return stage.cut_picture(stage.Config(**values), job)


def measure(values: dict, parts: list[dict], workers: int) -> float:
    """Seconds for all parts by `workers` processes, which have started and read a photograph before."""
    pool, function = jobs.start_pool(workers), partial(cut, values)
    with tempfile.TemporaryDirectory() as folder:
        for name in ("hr", "lr"):
            (Path(folder) / name).mkdir()
        parts = [part | {"folder": folder} for part in parts]
        if pool:
            list(pool.map(function, [part | {"groups": part["groups"][:1]} for part in parts[:2 * workers]]))
        begun = time.perf_counter()
        jobs.run_jobs(pool, function, parts, log=Path(folder) / "log.jsonl")
        seconds = time.perf_counter() - begun
    if pool:
        pool.shutdown()
    return seconds


def main(images: int) -> None:
    stage, cores, results = load_stage("01"), os.cpu_count(), {}
    pictures = [str(path) for _, path in photos.find("skimage", "hr_dir")]
    for kind, size, times in SIZES:
        values = {"run": "", "hr_size": size, "degradation": kind}
        cfg = stage.Config(**values)
        usable = [path for path in pictures if "reason" not in
                  photos.survey(stage.crop_size(cfg), cfg.min_detail, {"id": path, "path": path})]
        count = images * times // len(usable)
        names = {path: [f"{number}_{n}" for n in range(count)] for number, path in enumerate(usable)}
        single = [{"id": name, "path": path, "groups": [name]} for path, own in names.items() for name in own]
        chunks = [{"id": f"{path} {start}", "path": path, "groups": own[start:start + stage.AT_ONCE]}
                  for path, own in names.items() for start in range(0, len(own), stage.AT_ONCE)]
        ways = {"plain": (single, 1), "1 worker": (chunks, 1), f"{cores} workers": (chunks, cores)}
        seconds = {way: min(measure(values, *ways[way]) for _ in range(3)) for way in ways}
        rates = {way: round(len(single) / seconds[way], 1) for way in ways}
        linear = round(seconds["1 worker"] / seconds[f"{cores} workers"] / cores, 3)
        results[f"{kind} {size}"] = {"images_per_second": rates, "part_of_linear": linear, "cores": cores,
                                     "vs_plain": round(seconds["plain"] / seconds[f"{cores} workers"], 2)}
        print(f"{kind:<12} {size} px   " + "   ".join(f"{way} {rate}/s" for way, rate in rates.items())
              + f"   {linear:.2f} of linear over {cores} cores")
    out = ROOT / "runs" / "bench" / "dataset.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 128)
