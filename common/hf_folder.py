"""
Data sets as Hugging Face `imagefolder`: `export` writes one, `import_format: hf` reads it back, or one of this form.

    train/ validation/ test/    metadata.jsonl   a line per LR image, see `row`
                                lr/  hr/  candidates/   PNG
    README.md                   the data set card
"""
import json
import re
import shutil
from pathlib import Path

from common import run
from common.config import fail
from common.groups import SPLITS, files_of, load_groups, wrong_record
from common.import_tables import SPLIT_NAMES, rank_label, score_label
from common.run import write_lines
from common.metrics import AXES
from common.run import read_json
from common.tables import number, parse_json, picture, read_json_lines

FOLDERS = {"train": "train", "val": "validation", "test": "test"}           # the names that `datasets` expects
RECORD = ("id", "split", "source", "scale", "lr", "hr", "degradation", "candidates", "labels", "sha256")
OWN_FILE = re.compile(r"(lr|hr|candidates)/[\w.-]+\.png")
COLUMNS = ("lr_file_name", "hr_file_name", "candidates_file_names", "methods", "id", "source", "record",
           *(f"{kind}_{axis}" for kind in ("ranks", "scores") for axis in AXES))


def row(group: dict, has_hr: bool) -> dict:
    """A line of metadata.jsonl: pictures and labels as columns, and the line of groups.jsonl as text in `record`."""
    labels = group["labels"]
    own = {"id": group["id"], "source": group["source"], "lr_file_name": group["lr"]}
    own |= {"hr_file_name": group["hr"]} if has_hr else {}
    own |= {"candidates_file_names": [candidate["path"] for candidate in group["candidates"]],
            "methods": [candidate["method"] for candidate in group["candidates"]]}
    for axis in AXES:
        own |= {f"{kind}_{axis}": labels.get(axis, {}).get(kind) for kind in ("ranks", "scores")}
    return own | {"record": json.dumps(group)}


def export(folder: Path, out: Path, license_name: str) -> None:
    """Write the finished stage 01 in `folder` to `out`, which must not exist yet; it appears whole or not at all."""
    if out.exists():
        fail(f"export: {out} exists: delete it or give another folder")
    partial = Path(f"{out}.tmp")
    shutil.rmtree(partial, ignore_errors=True)
    present = {json.loads(line)["split"] for line in (folder / "groups.jsonl").read_text().splitlines()}
    groups = {split: load_groups(folder, split) for split in SPLITS if split in present}
    has_hr = any(group["hr"] for own in groups.values() for group in own)
    for split, own in groups.items():
        target = partial / FOLDERS[split]
        for group in own:
            for name in files_of(group):
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(folder / name, target / name)
        write_lines(target / "metadata.jsonl", [row(group, has_hr) for group in own])
    run.write_bytes(partial / "README.md", card(groups, license_name, read_json(folder / "manifest.json")).encode())
    partial.rename(out)
    print(f"exported {sum(map(len, groups.values()))} groups to {out}: load_dataset(\"imagefolder\", "
          f"data_dir=\"{out}\"), or back with import_from={out} import_format=hf")


def card(groups: dict[str, list[dict]], license_name: str, manifest: dict) -> str:
    """The data set card: label source, degradations, license, counts, splits."""
    every = [group for own in groups.values() for group in own]
    sources = sorted({label["source"] for group in every for label in group["labels"].values()}) or ["none"]
    kinds = sorted({group["degradation"].get("kind", "unknown (imported)") for group in every})
    methods = sorted({candidate["method"] for group in every for candidate in group["candidates"]})
    meaning = {"proxy": "computed with the ground truth, not by people", "import": "taken over from another set",
               "human": "given by people", "mllm": "answers of a multimodal LLM", "none": "there are none"}
    rows = [f"| {FOLDERS[split]} | {len(own)} | {sum(len(group['candidates']) for group in own)} | "
            f"{len({group['source'] for group in own})} |" for split, own in groups.items()]
    return "\n".join([
        "---", f"license: {json.dumps(license_name)}", "task_categories:", "- image-to-image", "---", "",
        "# Super-resolution preference set", "",
        "Each row is one low-resolution (LR) image, several super-resolved candidates, and their ranks (1 = best).", "",
        f"* Labels: {'; '.join(f'{name} ({meaning[name]})' for name in sources)}.",
        f"* Degradation from the ground truth to LR: {', '.join(kinds)}; scale {sorted({g['scale'] for g in every})}.",
        f"* License of the photographs: {license_name}.",
        f"* Methods: {', '.join(methods[:40])}{f' and {len(methods) - 40} more' * (len(methods) > 40)}.",
        f"* Built by 01_build_dataset.py at commit {manifest['git']['commit']}.", "",
        "| split | LR images | candidates | source photographs |", "| --- | --- | --- | --- |", *rows, "",
        "All LR images of a source photograph are in one split. `record` holds the whole line of groups.jsonl as JSON:",
        "crop, degradation, strengths, votes, and the SHA-256 of every file.", ""])


def read_hf(place: Path, roles: dict[str, str], margin: float) -> list[dict]:
    """Groups of every metadata.jsonl below `place`; its folder's name gives the split where it is one."""
    tables = sorted(place.rglob("metadata.jsonl"))
    if not tables:
        fail(f"import_from: {place} holds no metadata.jsonl: give the folder of an imagefolder data set")
    groups = []
    for table in tables:
        for line, own in read_json_lines(table):
            groups.append(read_row(table, line, own))
    return groups


def read_row(table: Path, line: int, own: dict) -> dict:
    """One group; with `record`, a line of our own export, exactly that group."""
    names, methods = own.get("candidates_file_names"), own.get("methods")
    if not isinstance(names, list) or not own.get("lr_file_name"):
        fail(table, line, "expected lr_file_name and a list candidates_file_names", do="add them")
    if not isinstance(methods, list) or len(methods) != len(names):
        fail(table, line, f"expected {len(names)} methods, got {methods!r}", do="give one name per candidate")
    lr, hr, *files = [name and picture(name, table.parent, table, line=line)
                      for name in (own["lr_file_name"], own.get("hr_file_name"), *names)]
    group = {"name": str(own.get("id") or own["lr_file_name"]), "source": str(own.get("source") or lr.stem), "hr": hr,
             "split": SPLIT_NAMES.get(table.parent.name), "lr": lr, "labels": {}, "where": f"{table} line {line}",
             "candidates": [{"method": str(m), "file": file, "extra": {}} for m, file in zip(methods, files)],
             "extra": {key: value for key, value in own.items() if key not in COLUMNS}}
    for axis in AXES:
        for kind, make in (("ranks", rank_label), ("scores", score_label)):
            values = own.get(f"{kind}_{axis}")
            if values is not None and (not isinstance(values, list) or len(values) != len(names)):
                fail(table, line, f"{kind}_{axis} should be {len(names)} numbers, got {values!r}", do="correct it")
            if values is not None:
                made = make([number(value, table, line, what=f"{kind}_{axis}") for value in values], {})
                group["labels"][axis] = made | group["labels"].get(axis, {})
    if "record" not in own:
        return group
    record = parse_json(own["record"], table, line)
    if not isinstance(record, dict) or not set(RECORD) <= set(record) or record["split"] != group["split"]:
        fail(table, line, f"record should be a line of groups.jsonl of the split {group['split']}", do="export again")
    if reason := wrong_record(record):
        fail(table, line, f"record: {reason}", do="export the set again")
    for axis in AXES:
        for kind in ("ranks", "scores"):
            name = f"{kind}_{axis}"
            if name in own and own[name] != record["labels"].get(axis, {}).get(kind):
                fail(table, line, f"{name} differs from `record`", do="change both, or remove `record`")
    for path in files_of(record):
        file = table.parent / path
        if not OWN_FILE.fullmatch(path) or not file.is_file() or record["sha256"].get(path) != run.sha256(file):
            fail(table, line, f"{path} is not the file that was exported (SHA-256)", do="export the set again")
    return group | {"record": record}
