"""
ST-LPIPS against plain loops, at toy weights of the names and kernel sizes of the published file.

Run     python -m pytest tests/test_st_lpips.py        # 3 s
"""
import math

import numpy as np
import pytest
import torch

from common import st_lpips

WIDTHS = (3, 4, 3, 2, 3)                                            # channels of the five maps


def toy_weights() -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    blur = torch.tensor([1.0, 2, 1])[:, None] * torch.tensor([1.0, 2, 1]) / 16
    weights = {"scaling_layer.shift": torch.tensor([-0.03, -0.088, -0.188])[:, None, None],
               "scaling_layer.scale": torch.tensor([0.458, 0.448, 0.45])[:, None, None]}
    for name, before, after, side in zip(("slice1.0", "slice2.5", "slice3.9", "slice4.11", "slice5.13"),
                                         (3, *WIDTHS), WIDTHS, (11, 5, 3, 3, 3)):
        weights[f"net.{name}.weight"] = torch.randn(after, before, side, side, generator=draw) / side
        weights[f"net.{name}.bias"] = torch.randn(after, generator=draw) / 5
    for name, width in (("slice1.1", 3), ("slice2.4", 3), ("slice3.8", 4)):
        weights[f"net.{name}.filt"] = blur.repeat(width, 1, 1, 1)
    return weights | {f"lin{i}.model.1.weight": torch.rand(1, width, 1, 1, generator=draw)
                      for i, width in enumerate(WIDTHS)}


def slow_conv(x, weight, bias, padding):
    """[C, h, w] -> [C', h', w'], zeros around."""
    x, side = np.pad(x, ((0, 0), (padding, padding), (padding, padding))), weight.shape[-1]
    out = np.zeros((len(weight), x.shape[1] - side + 1, x.shape[2] - side + 1))
    for c in range(len(weight)):
        for i in range(out.shape[1]):
            for j in range(out.shape[2]):
                out[c, i, j] = (x[:, i:i + side, j:j + side] * weight[c]).sum() + bias[c]
    return out


def slow_pool(x):
    return np.array([[[x[c, i:i + 3, j:j + 3].max() for j in range(x.shape[2] - 2)] for i in range(x.shape[1] - 2)]
                     for c in range(len(x))])


def slow_half(x):
    """(1, 2, 1) / 4 both ways at every second pixel, from one pixel outside on; the border is mirrored."""
    x, taps = np.pad(x, ((0, 0), (2, 2), (2, 2)), mode="reflect"), np.outer([1, 2, 1], [1, 2, 1]) / 16
    return np.array([[[(x[c, i:i + 3, j:j + 3] * taps).sum() for j in range(0, x.shape[2] - 2, 2)]
                      for i in range(0, x.shape[1] - 2, 2)] for c in range(len(x))])


def slow_maps(w, image):
    def conv(x, name, padding):
        return slow_conv(x, w[f"net.{name}.weight"].numpy(), w[f"net.{name}.bias"].numpy(), padding)
    shift, scale = ((w[f"scaling_layer.{name}"]).numpy() for name in ("shift", "scale"))
    maps = [np.maximum(0, slow_half(conv((2 * image - 1 - shift) / scale, "slice1.0", 2)))]
    for name, padding in (("slice2.5", 2), ("slice3.9", 1)):
        maps.append(np.maximum(0, conv(slow_half(slow_pool(maps[-1])), name, padding)))
    for name in ("slice4.11", "slice5.13"):
        maps.append(np.maximum(0, conv(maps[-1], name, 1)))
    return maps


def slow_distance(w, a, b):
    total = 0.0
    for i, (x, y) in enumerate(zip(slow_maps(w, a), slow_maps(w, b))):
        scale, parts = w[f"lin{i}.model.1.weight"].flatten().tolist(), []
        for p, q in zip(x.reshape(len(x), -1).T, y.reshape(len(y), -1).T):
            p, q = (v / (math.sqrt((v ** 2).sum()) + 1e-10) for v in (p, q))
            parts.append(sum(s * (c - d) ** 2 for s, c, d in zip(scale, p, q)))
        total += np.mean(parts)
    return total


def test_distances_are_those_of_plain_loops():
    weights, draw = toy_weights(), torch.Generator().manual_seed(1)
    a, b = torch.rand(2, 2, 3, 21, 24, generator=draw)
    found = st_lpips.distance(weights, a, b)
    for value, x, y in zip(found.tolist(), a.double().numpy(), b.double().numpy()):
        assert value == pytest.approx(slow_distance(weights, x, y), rel=1e-4) and value > 0.1
    assert not st_lpips.distance(weights, a, a).any()


def test_without_the_file_one_line_says_how_to_get_it(tmp_path, capsys):
    with pytest.raises(SystemExit):
        st_lpips.load(tmp_path, torch.device("cpu"))
    assert "pip download --no-deps stlpips-pytorch==0.0.2" in capsys.readouterr().err
    path = tmp_path / st_lpips.WEIGHTS
    path.parent.mkdir(parents=True)
    torch.save(toy_weights(), path)
    assert st_lpips.load(tmp_path, torch.device("cpu")).keys() == toy_weights().keys()
