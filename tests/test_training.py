"""
Averaged weights, swaps, updates and checkpoints: what the trainings of 02 and 04 share.

Run     python -m pytest tests/test_training.py         # 2 s
"""
import json
import math

import pytest
import torch

from common import run, training


def trained(value: float = 0.5) -> tuple[torch.nn.Module, dict, dict]:
    """A small network after one step: (module, its trained weights, its optimizers)."""
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).requires_grad_(True)
    module[0].bias.requires_grad_(False)
    weights = training.trainable(module)
    optimizers = {"adamw": torch.optim.AdamW(weights.values(), lr=value)}
    module(torch.ones(2, 3)).sum().backward()
    training.update(weights, optimizers, max_norm=1.0)
    return module, weights, optimizers


def test_average_and_swap_against_plain_arithmetic():
    module, weights, _ = trained()
    assert sorted(weights) == ["0.weight", "1.bias", "1.weight"]
    averaged, before = training.copied(weights), training.copied(weights)
    with torch.no_grad():
        module[0].weight.add_(1)
    training.average(averaged, weights, 0.9)
    assert torch.allclose(averaged["0.weight"], 0.9 * before["0.weight"] + 0.1 * (before["0.weight"] + 1))
    inside = averaged["0.weight"].clone()
    with pytest.raises(RuntimeError), training.swapped(weights, averaged):
        assert torch.equal(module[0].weight, inside)
        raise RuntimeError("an evaluation fails")
    assert torch.equal(module[0].weight, before["0.weight"] + 1) and torch.equal(averaged["0.weight"], inside)


@pytest.mark.parametrize("bad, gradient", [(0.0, 3.0), (1.0, 3.0), (0.0, math.nan)])
def test_an_update_that_cannot_be_computed_changes_nothing(bad, gradient):
    module, weights, optimizers = trained()
    before = training.copied(weights)
    for p in weights.values():
        p.grad = torch.full_like(p, gradient)
    norm, skipped = training.update(weights, optimizers, max_norm=1.0, bad=bad)
    usable = not bad and math.isfinite(gradient)
    count = sum(p.numel() for p in weights.values())
    assert skipped == (not usable) and (not usable or norm == pytest.approx(3 * count ** 0.5))
    assert all(torch.equal(p, before[name]) != usable for name, p in weights.items())
    assert all(p.grad is None for p in weights.values())


def test_learning_rates_follow_their_factor_also_after_a_resume(tmp_path):
    _, weights, optimizers = trained(0.5)
    training.set_lr(optimizers, 0.1)
    training.save_checkpoint(tmp_path, 1, weights=weights, optimizers=optimizers, state={})
    _, _, fresh = trained(0.5)
    training.resume(tmp_path, weights, fresh)
    training.set_lr(fresh, 0.2)
    assert fresh["adamw"].param_groups[0]["lr"] == pytest.approx(0.1)
    assert [round(training.cosine(at, 0.2), 6) for at in (0, 0.5, 1)] == [1, 0.6, 0.2]


def test_the_third_useless_step_in_a_row_stops_the_run(tmp_path, capsys):
    assert training.count_bad_steps(2, "", folder=tmp_path, step=5) == 0
    assert training.count_bad_steps(1, "grad_norm nan", folder=tmp_path, step=5) == 2
    with pytest.raises(SystemExit):
        training.count_bad_steps(2, "grad_norm nan", folder=tmp_path, step=6)
    assert "three steps in a row without a usable update (grad_norm nan)" in capsys.readouterr().err


# checkpoints -------------------------------------------------------------------------------------------------------

def save(folder, step: int, value: float = 0.0):
    _, weights, optimizers = trained()
    weights = {name: torch.full_like(p, value) for name, p in weights.items()} | {"half": torch.ones(2).bfloat16()}
    training.save_checkpoint(folder, step, weights=weights, optimizers=optimizers, state={"best": value})
    return folder / "checkpoints" / f"step_{step:06d}"


def load(folder):
    """(step, state, weights, moments) as a new process would find them."""
    _, weights, optimizers = trained(0.1)
    weights = {name: p.detach().clone() for name, p in weights.items()} | {"half": torch.zeros(2).bfloat16()}
    step, state = training.resume(folder, weights, optimizers)
    return step, state, weights, optimizers["adamw"].state_dict()


def test_a_checkpoint_comes_back_whole_and_the_newest_two_stay(tmp_path):
    assert load(tmp_path)[:2] == (0, {})
    for step in (1, 999_999, 1_000_000, 1_000_000):         # the last one is saved once more
        save(tmp_path, step, value=step / 2)
    assert [path.name for path in training.list_checkpoints(tmp_path)] == ["step_999999", "step_1000000"]
    step, state, weights, moments = load(tmp_path)
    assert step == 1_000_000 and state == {"best": 500_000, "step": 1_000_000}
    assert weights["0.weight"].eq(500_000).all() and weights["half"].tolist() == [1, 1]
    assert moments["param_groups"][0]["lr"] == 0.5 and len(moments["state"]) == 3
    training.drop_checkpoints(tmp_path)
    assert load(tmp_path)[:2] == (0, {})


def test_a_half_written_checkpoint_is_never_seen(tmp_path, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(training, "write_json", killed)           # state.json is the last file of a checkpoint
        with pytest.raises(KeyboardInterrupt):
            save(tmp_path, 2)
    assert (tmp_path / "checkpoints" / "step_000002.tmp" / "optimizers.pt").exists() and load(tmp_path)[0] == 1
    save(tmp_path, 2)                                           # the leftovers are no obstacle
    assert load(tmp_path)[0] == 2 and not list((tmp_path / "checkpoints").glob("*.tmp"))


def flip(content: bytes) -> bytes:
    """One bit changed, far from the header."""
    at = len(content) * 3 // 4
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1:]


@pytest.mark.parametrize("name, damage", [
    ("optimizers.pt", flip), ("optimizers.pt", lambda _: b""), ("weights.safetensors", flip),
    ("weights.safetensors", lambda _: b"\xff" * 99), ("state.json", lambda _: b"{"), ("state.json", lambda _: b"[]"),
    ("state.json", lambda _: b"{}")])
def test_a_damaged_checkpoint_gives_way_to_the_one_before_it(tmp_path, capsys, name, damage):
    older, newer = save(tmp_path, 1) / name, save(tmp_path, 2) / name
    newer.write_bytes(damage(newer.read_bytes()))
    assert load(tmp_path)[0] == 1
    assert "warning: " in (said := capsys.readouterr().err) and "step_000002 is damaged" in said
    older.unlink()
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "all checkpoints are damaged: delete that folder" in capsys.readouterr().err


def test_pickled_code_is_never_run(tmp_path, capsys):
    path = save(tmp_path, 1)
    torch.save({"adamw": print}, path / "optimizers.pt")
    state = json.loads((path / "state.json").read_text())
    state["sha256"]["optimizers.pt"] = run.sha256(path / "optimizers.pt")
    run.write_json(path / "state.json", state)
    with pytest.raises(SystemExit):
        load(tmp_path)
    assert "damaged" in capsys.readouterr().err


def test_a_checkpoint_of_another_model_is_refused(tmp_path, capsys):
    save(tmp_path, 1)
    for wanted in ({"0.weight": torch.zeros(5, 3)}, {"new": torch.zeros(1)}):
        with pytest.raises(SystemExit):
            training.resume(tmp_path, wanted, {})
        assert f"{list(wanted)[0]} is missing or of another size" in capsys.readouterr().err
