"""What a stage tells the person who started it: what it does, how long it takes, where results lie, what is next."""
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from common import dist
from common.config import STAGES

PURPOSE = {
    "01_build_dataset": "photographs become LR images, SR candidates and rankings of them",
    "02_train_reward": "a multimodal LLM learns from the rankings to judge a candidate beside its LR image",
    "03_eval_reward": "how often the judge is right on photographs that no training saw, and what fools it",
    "04_train_sr_grpo": "an SR diffusion model is tuned with GRPO on the judge's scores",
    "05_eval_sr": "the SR model before and after GRPO on test photographs, with the same noise"}


def command(stem: str) -> str:
    """Return the command that runs a stage with the config file, run and seed of this process."""
    shared = [argument for argument in sys.argv[2:] if argument.startswith(("run=", "seed="))]
    return " ".join(["python", f"{stem}.py", *sys.argv[1:2], *shared])


def print_start(folder: Path, stem: str) -> None:
    """Say what a stage is about to do, and where its results will lie."""
    dist.print0(f"{stem}: {PURPOSE[stem]}\nwrites {folder}")


def print_next(folder: Path) -> None:
    """Say where a finished stage lies and which command comes next."""
    dist.print0(f"{folder.name} is finished: {folder}   (delete that folder to run it again)")
    if folder.name in STAGES[:-1]:
        dist.print0(f"next: {command(STAGES[STAGES.index(folder.name) + 1])}")


def duration(seconds: float) -> str:
    """A time as a person would say it: 40 seconds, 12 minutes, 3.5 hours."""
    if seconds < 90:
        return f"{max(1, round(seconds))} seconds"
    return f"{round(seconds / 60)} minutes" if seconds < 90 * 60 else f"{seconds / 3600:.1f} hours"


def announce(items: Iterable, left: int, name: str, *, after: float = 10.0) -> Iterator:
    """
    Yield the items; after a few of them, one line says how long the rest of all `left` will take at their pace.

    The first item is not counted, as it warms up, and nothing is said in the first `after` seconds: what is over
    sooner needs no estimate. Under torchrun the main rank's pace counts.
    """
    started, said = 0.0, False
    for done, item in enumerate(items):
        now = time.time()
        started = now if done == 1 else started
        if done >= 3 and not said and now - started >= after:
            pace, said = (now - started) / (done - 1), True
            if dist.is_main():
                tqdm.write(f"{name}: about {duration(pace * (left - done))} more on this machine, at {pace:.2g} s each "
                           f"of {left - done} (mean of {done - 1} so far)")
        yield item
