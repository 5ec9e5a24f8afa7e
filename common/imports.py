"""
`import_from`: a preference set that exists becomes stage 01's groups.jsonl, with nothing of it lost.

Readers (import_tables.py, import_folders.py, hf_folder.py) say what is there; here it is checked, split by source,
copied (or converted to PNG without change of a pixel) and hashed.
"""
import os
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path

from common import duplicates, photos, run
from common.config import fail
from common.groups import SPLITS
from common.hf_folder import read_hf
from common.images import copy_png, read_image
from common.import_folders import read_refsr, read_sriqa
from common.import_tables import read_csv, read_mos
from common.jobs import run_jobs, stamp
from common.run import plain

READERS = {"refsr": read_refsr, "sriqa": read_sriqa, "csv": read_csv, "mos": read_mos, "hf": read_hf}
ROLES = {"refsr": None, "sriqa": ("lr", "hr", "candidate", "mos"), "csv": (), "mos": (), "hf": ()}     # None: any


def parse_roles(entries: list[str], kind: str) -> dict[str, str]:
    """{role: pattern} of the setting import_roles; AssertionError if it does not fit the format."""
    for entry in entries:
        role, equals, pattern = entry.partition("=")
        assert role and equals and pattern, f"import_roles: {entry!r} should look like ROLE=PATTERN"
        assert ROLES[kind] is None or role in ROLES[kind], \
            f"import_roles: {role!r} is no role of {kind}, which has {', '.join(ROLES[kind]) or 'none'}"
    roles = dict(entry.split("=", 1) for entry in entries)
    assert len(roles) == len(entries), f"import_roles: a role is given twice in {entries}"
    return roles


def build(cfg, folder: Path, pool: ProcessPoolExecutor | None) -> tuple[list[dict], list[dict]]:
    """
    The lines of groups.jsonl and the sources that look alike. Pictures lie in `folder`, which is removed again if the
    set is not sound; once copying has begun, what was copied is kept.
    """
    plan_file = folder / "progress" / "plan.json"
    begun_before = plan_file.exists()
    try:
        groups = read(cfg)
        near = duplicates.near_pairs([{"source": group["source"], "hash": lr_hash(group)} for group in groups])
        plan = plan_groups(cfg, groups, near)
    except SystemExit:
        if not begun_before:
            run.discard(folder)
        raise
    if begun_before and run.read_json(plan_file) != plan:
        fail(f"{cfg.import_from} changed since {folder} was begun: use another run= or delete the folder")
    run.write_json(plan_file, plan)
    print(f"{len(plan)} groups x {len(plan[0]['candidates'])} candidates of {cfg.import_from}")
    base = Path(cfg.import_from)
    copy = partial(copy_group, str(folder), str(base if base.is_dir() else base.parent))
    jobs = [group | {"key": stamp(files_of(group, "file"))} for group in plan]
    done = run_jobs(pool, copy, jobs, log=folder / "progress" / "import.jsonl")
    return [done[group["id"]] for group in plan], near


def read(cfg) -> list[dict]:
    """What the reader of import_format returns, as JSON, once it is clear that stages 02 and 03 can use it."""
    place, wants_file = Path(cfg.import_from), cfg.import_format in ("csv", "mos")
    if not (place.is_file() if wants_file else place.is_dir()):
        fail(f"import_from: {place} is not a {'file' if wants_file else 'folder'}, as import_format="
                 f"{cfg.import_format} needs: give an existing one")
    roles = parse_roles(cfg.import_roles, cfg.import_format)
    groups = plain(READERS[cfg.import_format](place, roles, cfg.tie_margin))
    if not groups:
        fail(f"import_from: {place} holds no group: its tables have no lines; give the whole set")
    count = len(groups[0]["candidates"])
    for group in groups:
        if len(group["candidates"]) != count or count < 2:
            fail(f"{group['where']}: {len(group['candidates'])} candidate(s), but {groups[0]['where']} has {count}:"
                     " all groups need the same number, 2 or more, as later stages compare them in batches; "
                     "remove candidates or groups, or import each number into its own run=")
    print(f"{sum(bool(group['labels']) for group in groups)} of {len(groups)} groups are labeled")
    return groups


def lr_hash(group: dict) -> list[str]:
    """The hash of a group's LR image (see duplicates)."""
    try:
        return duplicates.dct_hash(read_image(group["lr"]))
    except ValueError as error:
        fail(f"{group['where']}: {group['lr']} cannot be read ({error}): repair the file or remove the group")


def plan_groups(cfg, groups: list[dict], near: list[dict]) -> list[dict]:
    """
    Groups with split and id. Splits that the set gives are kept (quality.json then says what leaks); else they go by
    source, as for photographs, and sources with LR images that look alike share one.
    """
    given = [group["split"] for group in groups]
    if any(given) and not all(given):
        fail(f"{groups[given.index(None)]['where']}: no split, but others have one: give it for all or none")
    splits = {}
    for group in groups if any(given) else []:
        if splits.setdefault(group["source"], group["split"]) != group["split"]:
            fail(f"{group['where']}: source {group['source']!r} is in {splits[group['source']]} and in "
                     f"{group['split']}: a photograph must lie in one split only; correct the set")
    named = {"val": cfg.val_sources, "test": cfg.test_sources}
    fractions = {"test": cfg.test_fraction, "val": cfg.val_fraction}
    names = sorted({group["source"] for group in groups})
    splits = splits or photos.split_families(names, near, named, fractions, seed=cfg.seed)
    plan = []
    for split in SPLITS:
        own = [group for group in groups if splits[group["source"]] == split]
        plan += [group | {"split": split, "id": group["record"]["id"] if "record" in group else f"{split}_{n:05d}"}
                 for n, group in enumerate(own)]
    if len({group["id"] for group in plan}) < len(plan):
        fail(f"{cfg.import_from}: two groups have the same id: export the set again")
    return plan


def files_of(group: dict, key: str) -> list[str]:
    """LR, HR if there is one, and candidates, whose file is under `key`."""
    return [group["lr"], *([group["hr"]] if group["hr"] else []), *(one[key] for one in group["candidates"])]


def copy_group(folder: str, base: str, job: dict) -> dict:
    """Copy the pictures of one group; returns its line of groups.jsonl, with their old names relative to `base`."""
    root, name, record = Path(folder), job["id"], job.get("record")
    files = files_of(job, "file")
    if record:
        paths = files_of(record, "path")
    else:
        shown = [f"candidates/{name}_{index}.png" for index in range(len(job["candidates"]))]
        paths = [f"lr/{name}.png", *([f"hr/{name}.png"] if job["hr"] else []), *shown]
    try:
        sizes = [copy_png(file, root / path) for file, path in zip(files, paths)]
    except ValueError as error:
        fail(f"{job['where']}: {error}: repair the file or remove the group")
    scale = sizes[1][0] // sizes[0][0]
    for file, size in zip(files[1:], sizes[1:]):
        if scale < 1 or size != tuple(scale * side for side in sizes[0]):
            fail(f"{job['where']}: {file} is {size[1]}x{size[0]}; expected all candidates (and HR) to have one "
                     f"size, a whole multiple of the LR image's {sizes[0][1]}x{sizes[0][0]}: correct the group or "
                     "remove it")
    if record:
        return record
    old_names = {key: os.path.relpath(job[key], base) for key in ("lr", "hr") if job[key]}
    listed = [{"id": f"{name}_{index}", "path": f"candidates/{name}_{index}.png", "method": candidate["method"],
               "extra": {"file": os.path.relpath(candidate["file"], base)} | candidate["extra"]}
              for index, candidate in enumerate(job["candidates"])]
    return {"id": name, "split": job["split"], "source": job["source"], "scale": scale, "lr": paths[0],
            "hr": f"hr/{name}.png" if job["hr"] else None, "degradation": {}, "candidates": listed,
            "labels": job["labels"], "extra": {"name": job["name"]} | old_names | job["extra"],
            "sha256": {path: run.sha256(root / path) for path in paths}}
