"""
Restoring a user's folder: tiles without seams, any size and kind of picture, resumed runs, and nothing overwritten.

Run     python -m pytest tests/test_restoring.py        # 40 s
"""
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import metrics, restoring, run, sr_pipelines, sr_policy
from common.config import load_config
from common.images import read_image, resize, to_pixels, write_png
from common.sr_policy import Policy
from conftest import ROOT, load_stage, run_stage, tree
from test_eval_sr import lively, write_stage_04
from test_sr_policy import tiny_policy

CONFIG, KEY = ROOT / "configs" / "demo.yaml", (0, "folder", "cat.png")


class Convolutions(nn.Module):
    """A UNet's call without what sees the whole image (norms, attention): every output pixel sees 5 x 5."""

    def __init__(self, config):
        super().__init__()
        torch.manual_seed(3)
        self.config, self.layers = config, nn.Sequential(
            nn.Conv2d(39, 32, 3, padding=1), nn.Tanh(), nn.Conv2d(32, 16, 3, padding=1))

    def forward(self, x, time):
        return type("Output", (), {"sample": self.layers(x)})


@pytest.fixture(scope="module")
def policy() -> Policy:
    return lively(tiny_policy(sharpening=0.7))


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: smooth, with edges, some noise."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(1, height // 6), max(1, width // 6), 3), dtype=np.uint8)
    smooth = resize(coarse, (width, height), "bicubic").astype(float)
    return (smooth + rng.normal(0, 6, smooth.shape)).clip(0, 255).astype(np.uint8)


def restore(policy: Policy, lr: np.ndarray, tile: int = 16, overlap: int = 8, batch: int = 3) -> torch.Tensor:
    return restoring.restore(policy, lr, KEY, tile=tile, overlap=overlap, batch=batch)


# tiles -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("size, tile, overlap, multiple", [
    ((48, 64), 16, 4, 2), ((8, 200), 64, 16, 8), ((50, 34), 17, 5, 2), ((40, 40), 16, 0, 2), ((1000, 24), 9, 4, 1)])
def test_tiles_cover_the_image_and_weigh_nothing_where_they_end_inside_it(size, tile, overlap, multiple):
    tiles, total = restoring.cut_into_tiles(*size, tile=tile, overlap=overlap, multiple=multiple), np.zeros(size)
    for y, x in tiles.corners:
        (h, w), (height, width) = tiles.side, size
        assert y % multiple == x % multiple == 0 and 0 <= y <= height - h and 0 <= x <= width - w
        down, across = (restoring.tile_weights(at, side, whole, tiles.overlap).numpy()
                        for at, side, whole in ((y, h, height), (x, w, width)))
        total[y:y + h, x:x + w] += down[:, None] * across
        if overlap >= 4:
            assert (y == 0 or down[0] == 0) and (x + w == width or across[-1] == 0)
    assert total.min() > 0.999


def test_without_what_sees_the_whole_image_tiles_are_the_whole(policy):
    local, lr = Policy(Convolutions(policy.unet.config), policy.regressor, policy.sampler).eval(), picture(40, 52)
    whole = restore(local, lr, tile=64)
    tiled = restore(local, lr, tile=24, overlap=12)         # 3 px of margin; a pixel sees 2 px on, 1 of LR
    assert (whole - tiled).abs().max() < 1e-5 and whole.std() > 0.1
    assert (whole - restore(local, lr, tile=24, overlap=0)).abs().max() > 0.01


def test_one_tile_is_sr_policys_restore_to_the_bit_and_batches_do_not_matter(policy):
    lr = picture(16, 12)
    seen = policy.observe(torch.from_numpy(lr).permute(2, 0, 1)[None].float().div(255))
    noise = sr_policy.draw_noise([KEY], (16, 16, 12), seen.device)
    assert torch.equal(restore(policy, lr), sr_policy.restore(policy, seen, noise))
    assert (restore(policy, picture(40, 40), batch=1) - restore(policy, picture(40, 40), batch=16)).abs().max() < 1e-4


def test_there_is_no_seam(policy):
    """Differences of neighbors across the borders of tiles, over those at the same places of the whole image."""
    lr, found = picture(64, 96), {}
    whole = to_pixels(restore(policy, lr, tile=96))[0].astype(float)
    for overlap in (0, 8):
        tiled = to_pixels(restore(policy, lr, tile=32, overlap=overlap))[0].astype(float)
        tiles = restoring.cut_into_tiles(64, 96, tile=32, overlap=overlap, multiple=2)
        borders = sorted({4 * x for _, x in tiles.corners} - {0} | {4 * (x + 32) for _, x in tiles.corners} - {384})
        across, expected = (np.abs(np.diff(image, axis=1))[:, [x - 1 for x in borders]].mean()
                            for image in (tiled, whole))
        found[overlap] = across / expected, metrics.psnr(tiled / 255, whole / 255)
    assert 0.95 < found[8][0] < 1.05 and found[8][1] > 30 and found[8][1] > found[0][1], found


@pytest.mark.parametrize("size", [(1, 1), (1, 30), (17, 23)])
def test_any_size_is_padded_and_cropped_back(policy, size):
    assert restore(policy, picture(*size)).shape == (1, 3, 4 * size[0], 4 * size[1])


# color -------------------------------------------------------------------------------------------------------

def test_color_fixes_bring_back_the_color_of_lr_and_keep_detail():
    smooth = torch.from_numpy(picture(96, 96)).permute(2, 0, 1)[None].float().div(255) * 0.6 + 0.2
    detail = 0.05 * torch.randn(smooth.shape, generator=run.generator(0, "detail"))
    shifted, low = smooth + detail + torch.tensor([0.1, -0.05, 0.02])[:, None, None], restoring.low_frequencies
    fixed = restoring.fix_color(shifted, smooth, "adain")
    for c in range(3):                                                          # slow: a channel at a time
        assert float(fixed[0, c].mean()) == pytest.approx(float(smooth[0, c].mean()), abs=1e-3)
        assert float(fixed[0, c].std()) == pytest.approx(float(smooth[0, c].std()), abs=2e-3)
    fixed = restoring.fix_color(shifted, smooth, "wavelet")
    assert (low(fixed) - low(smooth)).abs().max() < 0.02 < (low(shifted) - low(smooth)).abs().max()
    assert ((fixed - smooth) - detail).square().mean().sqrt() < 0.01
    assert restoring.fix_color(shifted, smooth, "none") is shifted
    line = torch.zeros(1, 3, 1, 201)
    line[..., 100] = 1                                                          # all of it stays, ever wider
    assert float(low(line).sum()) == pytest.approx(3, abs=1e-5) and (low(line)[0, 0, 0] > 1e-6).sum() > 60


# a folder ----------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """A run folder with a finished stage 04 and nothing else."""
    return write_stage_04(tmp_path_factory.mktemp("run") / "04_train_sr_grpo", CONFIG).parent


@pytest.fixture
def photos(tmp_path) -> Path:
    """What people have: sub-folders, EXIF rotation, gray, 16 bit, transparency, two of one name, and broken files."""
    folder = tmp_path / "photos"
    (folder / "trip" / "day 1").mkdir(parents=True)
    write_png(folder / "cat.png", picture(24, 40))
    Image.fromarray(picture(18, 26, 1)).save(folder / "trip" / "day 1" / "cake & tea.jpg")
    turned = Image.Exif()
    turned[274] = 6                                                             # orientation: turn clockwise
    Image.fromarray(picture(12, 20, 2)).save(folder / "trip" / "turned.jpg", exif=turned)
    gray = picture(16, 16, 3)[..., 0]
    Image.fromarray(gray).save(folder / "gray.png")
    Image.fromarray(gray.astype(np.uint16) * 257).save(folder / "gray16.png")
    Image.fromarray(np.dstack([picture(16, 16, 4), np.full((16, 16), 99, np.uint8)])).save(folder / "alpha.png")
    Image.fromarray(picture(9, 9, 5)).save(folder / "cat.jpg")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "empty.jpg").write_bytes(b"")
    return folder


def arguments(trained: Path, photos: Path, out: Path, *more: str) -> list[str]:
    return [str(CONFIG), f"run={trained}", f"lr_dir={photos}", f"out={out}", "tile=16", "overlap=8",
            "images_per_gpu=4", *more]


def stage_05(argv: list[str]) -> dict:
    stage = load_stage("05")
    cfg = load_config(stage.Config, stage.__file__, argv)
    stage.main(cfg)
    return run.read_json(Path(cfg.out) / "manifest.json")["results"]


def test_a_folder_of_all_kinds_of_pictures(trained, photos):
    out, before = photos / "restored", tree(photos)                             # out may lie inside
    argv = arguments(trained, photos, out, "variants=base,tuned")
    results = stage_05(argv)
    assert results["pictures"] == results["restored_now"] == 7 and results["files_left_out"] == 2
    sizes = {path.relative_to(out / "tuned").as_posix(): read_image(path).shape[:2]
             for path in (out / "tuned").rglob("*.png")}
    assert sizes == {"cat.png.png": (96, 160), "cat.jpg.png": (36, 36), "trip/day 1/cake & tea.png": (72, 104),
                     "trip/turned.png": (80, 48), "gray.png": (64, 64), "gray16.png": (64, 64), "alpha.png": (64, 64)}
    skipped = [json.loads(line) for line in (out / "skipped.jsonl").read_text().splitlines()]
    assert [item["file"] for item in skipped] == ["broken.png", "empty.jpg"]
    turned, tuned = read_image(photos / "trip" / "turned.jpg"), sr_pipelines.load_policy(
        trained / "04_train_sr_grpo" / "policy", torch.device("cpu"))
    expected = restoring.restore(tuned, turned, (0, "folder", "trip/turned.jpg"), tile=16, overlap=8, batch=4)
    assert np.array_equal(read_image(out / "tuned" / "trip" / "turned.png"), to_pixels(expected)[0])
    assert not np.array_equal(*(read_image(out / name / "gray.png") for name in ("base", "tuned")))
    page = (out / "index.html").read_text()
    assert page.count("<figure>") == 7 and "broken.png" in page and "tuned/trip/day%201/cake%20%26%20tea.png" in page
    assert before.items() <= tree(photos).items()                               # no input was touched
    assert stage_05(argv)["restored_now"] == 0                                  # and no output is an input


def test_what_is_done_is_not_done_again(trained, photos, tmp_path):
    out = tmp_path / "restored"
    argv = arguments(trained, photos, out)
    stage_05(argv)
    first = tree(out)
    assert stage_05(argv)["restored_now"] == 0 and tree(out) == first
    (out / "tuned" / "gray.png").unlink()
    (out / "tuned" / "cat.jpg.png").write_bytes(b"torn")
    assert stage_05(argv)["restored_now"] == 2 and tree(out) == first
    write_png(photos / "gray.png", picture(16, 16, 9))                          # another input under an old name
    write_png(photos / "new.png", picture(8, 8, 10))
    assert stage_05(argv)["restored_now"] == 2
    other = trained / "04_train_sr_grpo" / "base"                         # other weights at the same place
    moved = trained / "04_train_sr_grpo" / "policy"
    moved.rename(tmp_path / "policy")
    try:
        other.rename(moved)
        assert stage_05(argv)["restored_now"] == 8
    finally:
        moved.rename(other)
        (tmp_path / "policy").rename(moved)
    assert tree(out)                                                            # closing .lock gives the lock back
    held = "import fcntl, sys; file = open(sys.argv[1], 'a'); fcntl.lockf(file, 2); print(flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", held, str(out / ".lock")],
                          stdin=subprocess.PIPE, stdout=subprocess.PIPE) as another, pytest.raises(SystemExit) as stop:
        another.stdout.readline()
        stage_05(argv)
    assert stop.value.code == 2 and (out / "manifest.json").exists()            # another process is at work there


def test_a_killed_run_goes_on_and_two_processes_write_the_same_bytes(trained, photos, tmp_path):
    for i in range(4):
        write_png(photos / f"more {i}.png", picture(32, 32, i))
    killed, two = tmp_path / "killed", tmp_path / "two"
    command = [sys.executable, "05_eval_sr.py", *arguments(trained, photos, killed)]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None and len(list(killed.glob("records/*.json"))) < 3:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not (killed / "manifest.json").exists()
    results = stage_05(arguments(trained, photos, killed))
    assert 0 < results["restored_now"] < results["pictures"] == 11
    done = run_stage("05", *map(str, arguments(trained, photos, two)), processes=2)
    assert done.returncode == 0, done.stderr
    assert tree(two) == tree(killed)


def test_a_policy_folder_is_enough(trained, photos, tmp_path):
    """Without any stage of a run."""
    argv = arguments(tmp_path / "none", photos / "trip", tmp_path / "out", f"policy={trained}/04_train_sr_grpo/policy")
    assert stage_05(argv)["pictures"] == 2


@pytest.mark.parametrize("more, message", [
    (("out={photos}/..",), "is or holds lr_dir"), (("out={photos}/trip",), "did not write"),
    (("out={photos}/gray.png",), "did not write"),
    (("lr_dir={photos}/none",), "is not a folder"), (("variants=best",), "should be tuned, base or both"),
    (("policy={photos}",), "neither the folder of a finished"), (("overlap=12",), "overlap 0 to half of it"),
    (("color_fix=lab",), "should be one of"), (("run={photos}",), "04_train_sr_grpo.py")])
def test_what_cannot_be_restored_is_refused_in_one_line(trained, photos, tmp_path, capsys, more, message):
    before = tree(photos)
    with pytest.raises(SystemExit) as stop:
        stage_05(arguments(trained, photos, tmp_path / "out", *(text.format(photos=photos) for text in more)))
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert stop.value.code == 2 and len(lines) == 1 and message in lines[0]
    assert tree(photos) == before
