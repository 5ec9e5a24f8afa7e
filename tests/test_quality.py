"""
Quality control of stage 01: near-duplicates, leaks, statistics, and the warning when labels only encode method names.

Run     python -m pytest tests/test_quality.py      # 5 s on one core
"""
import io
import json

import numpy as np
import pytest
from PIL import Image

from common import duplicates, photos, quality
from common.config import load_config
from common.groups import label_arrays, method_prior
from common.images import find, luma, read_image, resize, write_png
from conftest import load_stage


def photograph(seed, side=192):
    rng = np.random.default_rng(seed)
    coarse = resize(rng.integers(0, 256, (9, 9, 3)).astype(np.uint8), (side, side), "bicubic").astype(float)
    return (coarse + rng.normal(0, 12, coarse.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image, quality_):
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "JPEG", quality=quality_)
    return np.array(Image.open(buffer))


VARIANTS = {
    "another size": lambda x: resize(x, (77, 77), "bicubic"), "JPEG": lambda x: jpeg(x, 20),
    "brighter": lambda x: (x * 0.7 + 60).astype(np.uint8), "mirrored": lambda x: x[:, ::-1],
    "moved by 2 %": lambda x: np.roll(x, 4, axis=(0, 1)),
    "gray": lambda x: np.repeat(luma(x)[..., None], 3, 2).astype(np.uint8)}


@pytest.mark.parametrize("kind", VARIANTS)
def test_near_duplicates_are_found(kind):
    pictures = [{"source": f"p{i}", "hash": duplicates.dct_hash(photograph(i))} for i in range(6)]
    variant = np.ascontiguousarray(VARIANTS[kind](photograph(3)))
    pictures.append({"source": "copy", "hash": duplicates.dct_hash(variant)})
    pairs = duplicates.near_pairs(pictures)
    assert [(pair["a"], pair["b"]) for pair in pairs] == [("copy", "p3")]


def test_other_photographs_are_not_near():
    found = find("skimage", "hr_dir")
    pictures = [{"source": source, "hash": duplicates.dct_hash(read_image(path))} for source, path in found]
    assert duplicates.near_pairs(pictures) == []                        # the two motorcycle pictures are one source


def test_families_share_a_split_and_named_ones_decide():
    names = [f"n{i}" for i in range(10)]
    near = [{"a": "n1", "b": "n2"}, {"a": "n2", "b": "n7"}, {"a": "n4", "b": "n5"}]
    assert duplicates.families(names, near)["n7"] == "n1"
    fractions = {"val": 0.2, "test": 0.2}
    for seed in range(5):
        splits = photos.split_families(names, near, {"val": [], "test": []}, fractions, seed=seed)
        assert splits["n1"] == splits["n2"] == splits["n7"] and splits["n4"] == splits["n5"] and len(splits) == 10
    splits = photos.split_families(names, near, {"val": ["n7", "n2"], "test": ["n5"]}, fractions, seed=0)
    assert [splits[name] for name in ("n1", "n2", "n7", "n4", "n5")] == ["val"] * 3 + ["test"] * 2
    with pytest.raises(SystemExit):
        photos.split_families(names, near, {"val": ["n7"], "test": ["n1"]}, fractions, seed=0)


def group(split, source, ranks, methods=("a", "b", "c"), scores=None, digest=""):
    label = {"ranks": ranks, "source": "import", "votes": None} | ({"scores": scores} if scores else {})
    return {"id": f"{split}{source}{digest}", "split": split, "source": source, "lr": f"lr/{source}{digest}",
            "hr": None, "candidates": [{"method": method} for method in methods], "labels": {"overall": label},
            "sha256": {f"lr/{source}{digest}": digest or source}}


def test_warnings_of_method_names_leaks_and_missing_splits(capsys):
    groups = [group("train", f"s{i}", [1, 2, 3]) for i in range(4)]
    groups += [group("test", f"t{i}", [1, 2, 3]) for i in range(3)]
    groups += [group("test", "s0", [1, 2, 2], digest="x"), group("train", "u", [1, 2, 3], digest="x")]
    found = quality.check(groups, [{"a": "s1", "b": "t1", "bits": 3}, {"a": "s1", "b": "nowhere", "bits": 1}])
    assert found["method_prior"]["overall"] == 1 and np.isnan(found["method_prior"]["consistency"])
    assert found["leaks"] == {"near_duplicates_across_splits": 1, "sources_in_two_splits": ["s0"],
                              "files_in_two_splits": [["lr/s0x", "lr/ux"]]}
    assert found["labels"]["overall"] == {"groups": 9, "sources": ["import"], "pairs": 26, "tied": round(1 / 27, 4),
                                          "score_quartiles": None, "votes": 0}
    assert found["methods"]["a"] == {"train": 5, "val": 0, "test": 4, "overall": {"mean_rank": 1.0, "best": 1.0}}
    quality.show(found)
    told = capsys.readouterr().out
    for words in ("warning: labels mostly encode method names: the name alone orders 100% of the test pairs rightly",
                  "warning: 1 near-duplicate sources lie in different", "warning: 1 pictures lie in two splits",
                  "warning: no val groups", "3 methods, from a (9 candidates)"):
        assert words in told, told
    headline = quality.headline(found)
    assert headline["pairs"] == 26 and headline["label_source"] == "import"


def test_no_warning_where_names_say_nothing():
    rng = np.random.default_rng(0)
    groups = [group(("train", "test", "val")[i % 3], f"s{i}", rng.permutation([1, 2, 3]).tolist()) for i in range(60)]
    found = quality.check(groups, [])
    assert found["warnings"] == [] and abs(found["method_prior"]["overall"] - 0.5) < 0.2
    assert quality.check([g | {"labels": {}} for g in groups], [])["warnings"] == [
        "no labels: stage 02 cannot train on this set"]


def test_method_prior_by_hand():
    train = [group("train", "s", [1, 2, 3], scores=[0.9, 0.5, 0.1]),
             group("train", "t", [1, 3, 2], scores=[0.7, 0.3, 0.4])]
    test = [group("test", "u", [1, 2, 3], methods=("a", "c", "new"))]
    guess = method_prior(test, train, label_arrays(train))
    assert np.allclose(guess[0, :, 2], [0.8, 0.25, (0.8 + 0.4 + 0.25) / 3]) and np.isnan(guess[..., 0]).all()


def test_burst_photographs_stay_and_quality_json_says_so(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for i in range(5):
        write_png(pictures / f"p{i}.png", photograph(i))
    for i, kind in enumerate(("moved by 2 %", "brighter")):
        write_png(pictures / f"p3_burst{i}.png", VARIANTS[kind](photograph(3)))
    values = {"hr_dir": str(pictures), "hr_size": 32, "train_groups": 12, "val_groups": 3, "test_groups": 3,
              "degradation": "mild", "val_fraction": 0.2, "test_fraction": 0.2, "workers": 1,
              "max_source_share": 1.0}
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run": str(tmp_path / "run"), "seed": 0, "01_build_dataset": values}))
    module = load_stage("01")
    module.main(load_config(module.Config, module.__file__, [str(config)]))
    folder = tmp_path / "run" / "01_build_dataset"
    found = json.loads((folder / "quality.json").read_text())
    assert {(pair["a"], pair["b"]) for pair in found["near_duplicates"]} >= {("p3", "p3_burst0"), ("p3", "p3_burst1")}
    assert not any(found["leaks"].values())
    splits = {json.loads(line)["source"]: json.loads(line)["split"] for line in open(folder / "groups.jsonl")}
    assert len({splits[name] for name in splits if name.startswith("p3")}) == 1
    assert "pairs of near-duplicate sources" in capsys.readouterr().out
