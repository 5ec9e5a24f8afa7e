"""
Entries of stage 01's setting `candidates`, and the pictures of those that other programs or models make.

    folder:NAME=PATH
    hf:NAME=MODEL?seeds=2&steps=10+20&guidance=1+4      MODEL a hub id or folder; everything behind it is optional

Each combination of seed, steps and guidance is a candidate of every group. Its method is NAME, with -stepsN and
-guidanceG where these are given; seeds of one setting are the same method.
"""
import itertools
from pathlib import Path

import numpy as np

from common import candidates, external
from common.config import fail
from common.images import SUFFIXES, read_image

BUILT_IN = ("hr", "resample", "inconsistent", "unnatural")
QUERY = {"seeds": int, "steps": int, "guidance": float}


def is_external(entry: str) -> bool:
    return entry.startswith(("folder:", "hf:"))


def source_name(entry: str) -> str:
    return entry.partition(":")[2].partition("=")[0]


def hf_query(entry: str) -> tuple[str, dict[str, list]]:
    """(model, {key of QUERY: values}) of an hf: entry; AssertionError if it is not well formed."""
    model, _, query = entry.partition("=")[2].partition("?")
    found = {}
    for part in filter(None, query.split("&")):
        key, equals, text = part.partition("=")
        assert key in QUERY and equals and key not in found, \
            f"candidates: {entry!r}: {part!r} should be one of seeds=, steps=, guidance=, each once"
        try:
            found[key] = [QUERY[key](value) for value in text.split("+")]
        except ValueError:
            found[key] = []
        most = 1 if key == "seeds" else 100                             # values; seeds is a number of seeds
        assert 1 <= len(found[key]) <= most and min(found[key]) >= 1, \
            f"candidates: {entry!r}: {part!r} should hold numbers of at least 1, several joined by +, one for seeds"
    return model, found


def expand(entries: list[str]) -> list[str]:
    """Entries in which an hf: source stands for one seed, number of steps, and guidance."""
    single = []
    for entry in entries:
        if not entry.startswith("hf:") or "?" not in entry:
            single.append(entry)
            continue
        model, found = hf_query(entry)
        values = found | ({"seeds": range(1, found["seeds"][0] + 1)} if "seeds" in found else {})
        for combination in itertools.product(*values.values()):
            query = "&".join(f"{key}={value:g}" for key, value in zip(values, combination))
            single.append(f"hf:{source_name(entry)}={model}?{query}")
    return single


def record(entry: str) -> dict:
    """{method, seed, steps, guidance} of an expanded entry, as far as they are given."""
    query = {key: values[0] for key, values in (hf_query(entry)[1] if entry.startswith("hf:") else {}).items()}
    method = source_name(entry) + "".join(f"-{key}{query[key]:g}" for key in ("steps", "guidance") if key in query)
    return {"method": method} | {"seed" if key == "seeds" else key: value for key, value in query.items()}


def check(entries: list[str], has_hr: bool, prompt: str) -> None:
    """AssertionError unless `entries` are a valid setting `candidates`; prompt: the setting hf_prompt."""
    assert len(expand(entries)) >= 2, "candidates: at least two are needed to compare"
    for entry in entries:
        if is_external(entry):
            assert source_name(entry).isidentifier() and entry.partition("=")[2].partition("?")[0], \
                f"candidates: {entry!r} should look like folder:NAME=PATH or hf:NAME=MODEL, NAME of letters only"
            guided = entry.startswith("hf:") and max(hf_query(entry)[1].get("guidance", [1])) > 1
            assert prompt or not guided, \
                f"candidates: {entry!r}: guidance compares with an empty prompt, so it needs hf_prompt"
            continue
        for name in entry.split("|"):
            assert name in BUILT_IN, \
                f"candidates: {name!r} is none of {', '.join(BUILT_IN)}, folder:NAME=PATH, hf:NAME=MODEL"
            assert has_hr or name == "resample", \
                f"candidates: {name!r} needs ground truth, which lr_dir has not; use resample, folder: or hf:"
    names = [source_name(entry) for entry in entries if is_external(entry)]
    taken = {"hr", *candidates.RESAMPLERS, *candidates.INCONSISTENT, *candidates.UNNATURAL}.intersection(names)
    assert not taken, f"candidates: {', '.join(sorted(taken))} is a method of our own: give the source another name"
    assert len(names) == len(set(names)), f"candidates: two folder: or hf: sources share a name ({names})"


def where(folder: Path, entry: str) -> Path:
    """The folder with the outputs of an expanded entry."""
    if entry.startswith("folder:"):
        return Path(entry.partition("=")[2])
    own = record(entry)
    return folder / "external" / (own["method"] + (f"-seed{own['seed']}" if "seed" in own else ""))


def run_models(cfg, folder: Path, names: list[str]) -> None:
    """Make what the hf: sources lack, every rank its share of the LR images folder/lr/<name>.png."""
    for entry in expand(cfg.candidates):
        if entry.startswith("hf:"):
            model, query = hf_query(entry)
            options = {key: values[0] for key, values in query.items()} | {"prompt": cfg.hf_prompt}
            external.restore_folder(model, folder / "lr", where(folder, entry), names=names, options=options,
                                    steps=cfg.hf_steps, seed=cfg.seed, batch=cfg.hf_batch)


def external_files(cfg, folder: Path, names: list[str]) -> dict[str, dict[str, str]]:
    """Group id -> {expanded entry: path of the image}; stops if a folder lacks outputs."""
    files = {name: {} for name in names}
    for entry in filter(is_external, expand(cfg.candidates)):
        place = where(folder, entry)
        paths = [path for path in sorted(place.glob("*")) if path.suffix.lower() in SUFFIXES]
        by_name = {}
        for path in paths:
            if by_name.setdefault(path.stem, path) != path:
                fail(f"candidates: {entry}: {by_name[path.stem]} and {path.name} are both for one LR image: remove "
                         "one of them")
        missing = [name for name in files if name not in by_name]
        if missing:
            fail(f"candidates: {entry}: {place} lacks {len(missing)} of {len(names)} outputs (first: "
                     f"{missing[0]}.png). Run the x{cfg.scale} SR program on {folder / 'lr'}, write its "
                     f"outputs to {place} under the same names, then run this command again to go on")
        for name in files:
            files[name][entry] = str(by_name[name])
    return files


def read_external(cfg, entry: str, path: str) -> np.ndarray:
    """The image of an external source, of the size that cfg asks for."""
    try:
        image = read_image(path)
    except ValueError as error:
        fail(f"candidates: {entry}: {path} cannot be read ({error}): make it again")
    if image.shape[:2] != (cfg.hr_size, cfg.hr_size):
        fail(f"candidates: {entry}: {path} is {image.shape[1]}x{image.shape[0]}, expected {cfg.hr_size}x"
                 f"{cfg.hr_size}, {cfg.scale} times the LR image")
    return image
