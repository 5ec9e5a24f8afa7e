"""One row of metrics goes to metrics.jsonl, to curves.png at evaluations, and to TensorBoard or W&B if asked."""
import importlib.util
import math
from pathlib import Path

from common import curves, dist, run

LOG_TO = ("none", "tensorboard", "wandb")
SENDERS = {}                        # folder -> function(step, numbers) of this process


def check(log_to: str) -> None:
    """For __post_init__: refuse what does not exist or is not installed, before any work."""
    assert log_to in LOG_TO, f"log_to should be one of {', '.join(LOG_TO)}, got {log_to!r}"
    assert log_to == "none" or importlib.util.find_spec(log_to), \
        f"log_to={log_to}: it is not installed: `pip install {log_to}`, or log_to=none"


def log(cfg, folder: Path, step: int, row: dict) -> None:
    """
    Append row to metrics.jsonl and pass its numbers on (main rank only).

    A resumed run goes on in the same TensorBoard curves, from its first step on; for W&B it is a new run of the
    same group, named after that step. cfg: the Config of 02 or 04.
    """
    run.log_metrics(folder, step, row)
    if not dist.is_main():
        return
    if any(key.startswith("val_") for key in row):
        curves.write(folder)
    if cfg.log_to == "none":
        return
    if folder not in SENDERS:
        SENDERS[folder] = {"tensorboard": to_tensorboard, "wandb": to_wandb}[cfg.log_to](cfg, folder, step)
    numbers = {key: float(value) for key, value in row.items() if not isinstance(value, str)}
    SENDERS[folder](step, {key: value for key, value in numbers.items() if math.isfinite(value)})


def to_tensorboard(cfg, folder: Path, first: int):
    """Event files in <folder>/tensorboard, from step `first` on: `tensorboard --logdir <run>` shows them."""
    from torch.utils.tensorboard import SummaryWriter           # only if asked: it is not in requirements.txt
    writer = SummaryWriter(folder / "tensorboard", purge_step=first)

    def send(step: int, numbers: dict[str, float]) -> None:
        for key, value in numbers.items():
            writer.add_scalar(key, value, step)
        writer.flush()
    return send


def to_wandb(cfg, folder: Path, first: int):
    """A run of the project refreward-sr; WANDB_MODE=offline keeps it in <folder>/wandb."""
    import wandb                                                # only if asked: it is not in requirements.txt
    opened = wandb.init(project="refreward-sr", group=str(folder), name=f"{folder.name} from step {first}", dir=folder,
                        config=vars(cfg), reinit="create_new")
    return lambda step, numbers: opened.log(numbers, step=step)
