"""
Two real processes (gloo) under torchrun, and the same calls in one.

Run     python -m pytest tests/test_dist.py         # 40 s
"""

import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))        # torchrun starts this file, see the end
from common import alive, dist, run


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
    run.save_checkpoint(stage, 1, weights={"w": mine}, optimizer={}, state={})
    run.write_manifest(stage, script="/anywhere/02_train_reward.py", started=0.0, inputs=[], results={})
    dist.barrier()
    assert (stage / "metrics.jsonl").read_text().count("\n") == 1               # only the main rank writes
    assert run.latest_checkpoint(stage)[1]["w"].tolist() == [1, 10]
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


def check_death(_: str) -> None:
    """Rank 1 of three is killed, as by the system for want of memory; one waits for it, one is busy for an hour."""
    dist.barrier()
    if dist.rank() == 1:
        time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)
    if dist.rank() == 2:
        time.sleep(3600)
    dist.barrier()


def launch(check: str, folder: Path, processes: int = 2) -> subprocess.CompletedProcess:
    """Run a check of this file on several ranks."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}", __file__]
    return subprocess.run([*command, check, str(folder)], capture_output=True, text=True, timeout=300,
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


def test_a_killed_rank_ends_the_job_at_once_and_is_named():
    begun = time.monotonic()
    done = launch("death", Path(), processes=3)
    named = [line for line in done.stderr.splitlines() if line.startswith("error: rank ")]
    assert done.returncode != 0 and time.monotonic() - begun < 60
    assert named[0].startswith("error: rank 1 on ") and "was killed (out of memory?) or has crashed" in named[0]


# one of two ranks that watch each other without torch or torchrun, as they do on two machines
RANK = """
import os, signal, sys, time
sys.path.insert(0, os.getcwd())
from common import alive
rank, how, port = int(sys.argv[1]), sys.argv[2], sys.argv[3]
alive.BEAT, alive.SILENCE, alive.GRACE = 0.1, 1.0, 0.5
def share_port(number):
    if number:
        open(port + ".new", "w").write(str(number)), os.rename(port + ".new", port)
    while not os.path.exists(port):
        time.sleep(0.01)
    return int(open(port).read())
alive.start(rank, 2, share_port, stuck=1.0)
alive.STATE.calls = 7
time.sleep(0.3)
if how == "finish":
    alive.stop(), time.sleep(rank), sys.exit()
if rank == 1:
    assert how != "raise", "no such image"
    if how in ("kill", "freeze"):
        os.kill(os.getpid(), signal.SIGKILL if how == "kill" else signal.SIGSTOP)
    sys.exit("error: cannot write" if how == "fail" else time.sleep(30))
alive.STATE.calls += how == "hang"
time.sleep(30)
"""


@pytest.mark.parametrize("how, status, says", [
    ("finish", 0, ""), ("kill", 1, "rank 1 on HOST was killed (out of memory?)"), ("fail", 1, "cannot write"),
    ("raise", 1, "rank 1 on HOST: AssertionError: no such image"),
    ("freeze", 1, "rank 1 on HOST has given no sign of life for 1 s"),
    ("hang", 1, "rank 1 on HOST hangs: for 1 s it has not come to a call that other ranks wait in")])
def test_ranks_notice_how_another_one_ends(tmp_path, how, status, says):
    command, environment = [sys.executable, "-c", RANK], os.environ | {"MASTER_ADDR": "localhost"}
    ranks = [subprocess.Popen([*command, str(rank), how, str(tmp_path / "port")], stderr=subprocess.PIPE, text=True,
                              cwd=Path(__file__).parents[1], env=environment) for rank in (0, 1)]
    begun, said = time.monotonic(), [ranks[0].communicate(timeout=20)[1]]
    ranks[1].send_signal(signal.SIGCONT)                                # or it would stay frozen for ever
    said.append(ranks[1].communicate(timeout=20)[1])
    assert (ranks[0].returncode, time.monotonic() - begun < 10) == (status, True)
    told = [line for text in said for line in text.splitlines() if line.startswith("error: ")]
    assert f"error: {says}".replace("HOST", alive.HOST) in "\n".join(told) or (how == "finish" and not told), told
    assert how == "finish" or any(line.startswith(f"error: rank 1 on {alive.HOST}") for line in told)


def test_one_process_needs_no_torchrun():
    torch.backends.cudnn.allow_tf32 = True                              # torch's default
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
    {"exchange": check_exchange, "drift": check_drift, "death": check_death}[sys.argv[1]](sys.argv[2])
    dist.finish()
