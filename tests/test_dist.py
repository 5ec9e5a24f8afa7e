"""
Two real processes (gloo) under torchrun, and the same calls in one.

Run     python -m pytest tests/test_dist.py         # 40 s
"""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
from common import dist, run, training


@dataclass
class Config:
    run: str
    seed: int = 0


def check_exchange(folder: str) -> None:
    """What two ranks have to agree on; runs on each of them."""
    rank = dist.rank()
    assert dist.world_size() == 2 and dist.is_main() == (rank == 0)
    mine = torch.tensor([1.0, 10.0]) * (rank + 1)
    assert dist.all_sum(mine).tolist() == [3, 30] and mine[0] == rank + 1       # the input stays as it was

    for dtype in (torch.float32, torch.bfloat16, torch.int64, torch.bool):
        rows = torch.full((2 - rank, 3), rank + 1).to(dtype)                        # two rows and one
        expected = torch.cat([torch.full((2, 3), 1), torch.full((1, 3), 2)]).to(dtype)
        assert torch.equal(dist.gather_rows(rows), expected)
    empty_here = torch.arange(3.0, requires_grad=True) if rank else torch.zeros(0)
    assert dist.gather_rows(empty_here).tolist() == [0, 1, 2]
    assert dist.gather_rows(torch.zeros(0, 5)).shape == (0, 5)

    params = [torch.nn.Parameter(torch.zeros(2)) for _ in range(3)]
    params[0].grad = torch.full((2,), rank + 1.0)
    if rank:
        params[1].grad = torch.ones(2)                  # rank 0 has none, and nobody has one for the third
    dist.sum_gradients(params)
    assert [param.grad.tolist() for param in params] == [[3, 3], [1, 1], [0, 0]]

    dist.assert_same_weights([("a", torch.ones(3)), ("b", torch.arange(4))])
    dist.print0(f"rank {rank} prints")

    stage = run.open_stage(Config(run=folder), "/anywhere/02_train_reward.py")
    assert (stage / "config.yaml").exists()
    run.log_metrics(stage, 0, {"rank": rank})
    training.save_checkpoint(stage, 1, weights={"w": torch.ones(2)}, optimizers={}, state={})
    run.write_manifest(stage, script="/anywhere/02_train_reward.py", started=0.0, inputs=[], results={})
    dist.barrier()
    assert (stage / "metrics.jsonl").read_text().count("\n") == 1               # only the main rank writes
    weights = {"w": torch.zeros(2)}
    assert training.resume(stage, weights, {})[0] == 1 and weights["w"].tolist() == [1, 1]
    with pytest.raises(SystemExit) as stop:
        run.open_stage(Config(run=folder), "/anywhere/02_train_reward.py")
    assert stop.value.code == 0


def check_drift(folder: str) -> None:
    """Rank 1's weights differ in one bit of one tensor: every rank has to stop."""
    drifted = torch.ones(3)
    drifted[1] += dist.rank() * 1e-7
    try:
        dist.assert_same_weights([("fine", torch.ones(3)), ("layer.weight", drifted), ("last", drifted)])
    except SystemExit as stop:
        Path(folder, f"stopped_{dist.rank()}").write_text(str(stop.code))
        dist.barrier()                          # torchrun ends the other rank as soon as one has failed
        raise


def check_end(how: str) -> None:
    """Rank 1 raises or is killed, while rank 0 waits for ever outside of Python, as in a collective of nccl."""
    with run.explained():
        dist.barrier()
        if dist.rank() == 1 and how == "raises":
            raise ValueError("rank 1 has a bug")
        if dist.rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        mutex, lock = ctypes.create_string_buffer(64), ctypes.CDLL(None).pthread_mutex_lock
        lock(mutex), lock(mutex)


def launch(check: str, argument: Path | str) -> subprocess.CompletedProcess:
    """Run a check of this file on two ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", __file__]
    return subprocess.run([*command, check, str(argument)], capture_output=True, text=True, timeout=300,
                          env=os.environ | {"CUDA_VISIBLE_DEVICES": ""})


def test_two_ranks_exchange_and_share_a_stage(tmp_path):
    done = launch("exchange", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "rank 0 prints" in done.stdout and "rank 1 prints" not in done.stdout
    assert done.stdout.count("02_train_reward is finished") == 2        # written once, found finished once


def test_weight_drift_stops_every_rank(tmp_path):
    done = launch("drift", tmp_path)
    assert done.returncode != 0
    assert "error: the ranks no longer have the same weights: layer.weight" in done.stderr
    assert [Path(tmp_path, f"stopped_{rank}").read_text() for rank in (0, 1)] == ["2", "2"]


# -6: Python's exit sometimes destroys a thread of gloo that still runs, which aborts the process after its traceback
@pytest.mark.parametrize("how, status", [("raises", "(1|-6)"), ("is killed", "-9")])
def test_torchrun_ends_the_job_at_once_and_names_the_rank(how, status):
    begun = time.monotonic()
    done = launch("end", how)
    assert done.returncode != 0 and time.monotonic() - begun < 25       # after 30 s torchrun would send SIGKILL
    assert re.search(rf"rank\s*: 1 \(local_rank: 1\)\s*exitcode\s*: {status} ", done.stderr), done.stderr
    assert ("ValueError: rank 1 has a bug" in done.stderr) == (how == "raises")


def test_one_process_needs_no_torchrun():
    dist.allow_tf32(True)                                               # of convolutions: torch's default
    assert dist.init().type in ("cpu", "cuda")
    assert not torch.backends.cudnn.allow_tf32 and not torch.backends.cuda.matmul.allow_tf32    # float32 is float32
    assert (dist.rank(), dist.world_size(), dist.is_main()) == (0, 1, True)
    tensor = torch.arange(4.0, requires_grad=True)
    for result in (dist.all_sum(tensor), dist.gather_rows(tensor)):
        assert result.tolist() == [0, 1, 2, 3] and not result.requires_grad
        assert result.data_ptr() != tensor.data_ptr()                   # a new tensor, as on many ranks
    param = torch.nn.Parameter(torch.zeros(2))
    dist.sum_gradients([param])
    assert param.grad.tolist() == [0, 0]
    dist.assert_same_weights([("param", param)])
    dist.barrier()
    dist.finish()


if __name__ == "__main__":                                              # one rank of `launch`
    dist.init()
    {"exchange": check_exchange, "drift": check_drift, "end": check_end}[sys.argv[1]](sys.argv[2])
    dist.finish()
