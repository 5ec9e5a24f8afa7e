"""
What people say: the page over real HTTP, the log, what is asked next, labels, agreement.

Run     python -m pytest tests/test_annotate.py         # 1 min, half of it the toy run that all tests share
"""
import http.client
import itertools
import json
import math
import signal
import subprocess
import sys
import threading
from collections import Counter
from contextlib import contextmanager
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy.optimize import minimize

from annotation_server import Client, copy_toy, read_lines, serving
from common import annotate, metrics
from common.groups import all_groups, load_cohorts
from common.images import read_image, resize
from conftest import ROOT, run_stage
from test_build_dataset import run_here

GROUPS = {f"g{i}": [f"g{i}_{c}" for c in range(4)] for i in range(5)}
RECORDS = [{"id": name, "lr": f"{name}.png", "candidates": [{"id": c, "path": f"{c}.png"} for c in members]}
           for name, members in GROUPS.items()]
NUMBER = itertools.count()


def line(annotator, group, candidates, axis, ranks, **more):
    """A judgement as it lies in the file."""
    return {"id": str(next(NUMBER)), "time": 0.0, "annotator": annotator, "group": group,
            "pictures": annotate.pictures_of(RECORDS[0]), "task": f"t{group}", "candidates": candidates, "axis": axis,
            "ranks": ranks, "seconds": 3.0, "repeat_of": None} | more


def work(lines, annotator, screens, shown=2):
    """Answer screens, the higher number of a candidate is the better one; the tasks, and lines grows."""
    tasks = []
    for _ in range(screens):
        task = annotate.next_task(GROUPS, lines, annotator, seed=0, shown=shown)
        if task is None:
            break
        tasks.append(task)
        ranks = metrics.ranks([int(name[-1]) for name in task["candidates"]], 1e-9)
        for axis in task["open"]:
            lines.append(line(annotator, task["group"], task["candidates"], axis, ranks, task=task["id"],
                              repeat_of=task["repeat_of"]))
    return tasks


# what is asked next ------------------------------------------------------------------------------------------

def test_what_was_judged_least_comes_next_and_nothing_twice_but_repeats():
    lines = []
    tasks = work(lines, "ann", 100)
    new = [task for task in tasks if not task["repeat_of"]]
    pairs = [(task["group"], frozenset(task["candidates"])) for task in new]
    assert len(new) == len(set(pairs)) == 5 * 6 and annotate.next_task(GROUPS, lines, "ann", seed=0, shown=2) is None
    groups = [task["group"] for task in new]
    assert all(set(groups[start:start + 5]) == set(GROUPS) for start in range(0, 15, 5))
    for group in GROUPS:                    # three pairs connect four candidates
        first = [pair for name, pair in pairs if name == group][:3]
        assert not first[0] & first[1] and first[2] & first[0] and first[2] & first[1]
    again, other = [], []
    assert work(again, "ann", 9) == tasks[:9], "a function of seed, annotator and judgements"
    assert work(other, "bob", 9) != tasks[:9]
    assert len(work([], "ann", 100, shown=4)) == 5


def test_repeats_of_oneself_and_of_others():
    lines = []
    tasks = work(lines, "ann", 40)
    place = {task["id"]: index for index, task in enumerate(tasks)}
    repeats = [task for task in tasks if task["repeat_of"]]
    assert len(place) == len(tasks) and len(repeats) >= 3
    for task in repeats:
        old = tasks[place[task["repeat_of"]]]
        assert place[task["id"]] - place[old["id"]] > annotate.GAP
        assert sorted(old["candidates"]) == sorted(task["candidates"])
    assert len({task["repeat_of"] for task in repeats}) == len(repeats)
    lines = []
    seen = {frozenset(task["candidates"]) for task in work(lines, "ann", 4)}
    shared = work(lines, "bob", 4)[annotate.SHARED_AT]
    assert frozenset(shared["candidates"]) in seen and shared["repeat_of"] is None


def test_the_second_question_of_a_screen_comes_first():
    lines = []
    work(lines, "ann", 3)
    task = annotate.next_task(GROUPS, lines, "ann", seed=0, shown=2)
    lines.append(line("ann", task["group"], task["candidates"], task["open"][0], [1, 2], task=task["id"]))
    work(lines, "bob", 2)
    assert annotate.next_task(GROUPS, lines, "ann", seed=0, shown=2) == task | {"open": task["open"][1:]}


# the log -----------------------------------------------------------------------------------------------------

def test_a_cut_last_line_is_dropped_and_anything_else_is_named(tmp_path, capsys):
    path = tmp_path / annotate.LOG
    assert annotate.read_log(path, RECORDS) == []
    with annotate.open_log(path) as log:
        said = line("ann", "g0", GROUPS["g0"][:2], "consistency", [1, 1])
        del said["id"]
        first = annotate.append(log, said)
        with pytest.raises(SystemExit):
            annotate.open_log(path)                                         # a second server on the same run
        assert "in use" in capsys.readouterr().err
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "x", "time"')
    assert annotate.read_log(path, RECORDS) == [first]
    with annotate.open_log(path) as log:
        annotate.append(log, {"annotator": "ann", "revokes": first["id"]})
    lines = annotate.read_log(path, RECORDS)
    assert path.read_bytes().startswith(whole) and len(lines) == 2 and annotate.live(lines) == []
    for wrong, word in (("nonsense", "JSON"), ("[]", "keys"), ('{"id": 1}', "keys"),
                        (json.dumps(first | {"group": "g9"}), "g9"),
                        (json.dumps(first | {"pictures": "0" * 16}), "another build"),
                        (json.dumps(first | {"ranks": [1, 3]}), "ranks"),
                        (json.dumps(first | {"group": ["g0"]}), "group should be text"),
                        (json.dumps(first | {"seconds": None}), "seconds should be a number"),
                        (json.dumps(first | {"candidates": ["g1_0", "g1_1"]}), "candidates"),
                        (json.dumps({"id": "1", "time": 0, "annotator": "a", "revokes": "q"}), "above")):
        path.write_bytes(whole + wrong.encode() + b"\n")
        with pytest.raises(SystemExit):
            annotate.read_log(path, RECORDS)
        error = capsys.readouterr().err
        assert "line 2" in error and word in error and error.count("\n") == 1


# labels ------------------------------------------------------------------------------------------------------

def test_strengths_are_the_optimum_of_a_plain_loop():
    wins = np.random.default_rng(0).integers(0, 6, (5, 5)) * (1 - np.eye(5)) + np.diag(np.full(4, 0.5), 1)

    def slow_loss(s):
        total = sum(float(x) ** 2 for x in s) / (2 * annotate.PRIOR ** 2)
        for i, j in itertools.permutations(range(5), 2):
            total -= wins[i, j] * math.log(math.exp(s[i]) / (math.exp(s[i]) + math.exp(s[j])))
        return total

    slow = minimize(slow_loss, np.zeros(5), options={"gtol": 1e-7}).x
    assert np.allclose(annotate.strengths(wins), slow, atol=1e-4) and np.ptp(slow) > 0.2
    one, other = annotate.strengths(np.array([[0, 1.0], [0, 0]]))
    assert 0.9 < one - other < 1.3, "one vote pulls two candidates apart by about 1"


def test_labels_only_where_the_comparisons_connect_all_candidates():
    a, b, c, d = GROUPS["g0"]
    four = ["g1_2", "g1_0", "g1_3", "g1_1"]
    lines = [line("ann", "g0", [a, b], "consistency", [1, 2]), line("ann", "g0", [c, b], "consistency", [2, 1]),
             line("bob", "g0", [c, d], "consistency", [1, 2]), line("bob", "g0", [a, b], "naturalness", [2, 1]),
             line("ann", "g1", four, "naturalness", [1, 2, 2, 3]), line("ann", "g1", four, "consistency", [1, 2, 3, 4]),
             line("ann", "g2", GROUPS["g2"], "naturalness", None)]
    labels = annotate.human_labels(RECORDS, lines)
    assert set(labels["g0"]) == {"consistency"} and set(labels["g1"]) == set(metrics.AXES) and not labels["g2"]
    assert labels["g0"]["consistency"]["ranks"] == [1, 2, 3, 4]
    assert labels["g0"]["consistency"] | {"scores": 0, "ranks": 0} == {
        "ranks": 0, "scores": 0, "source": "human", "votes": [1, 1, 1, 0], "raters": 2, "scale": "group"}
    natural = labels["g1"]["naturalness"]
    assert natural["ranks"] == [2, 3, 1, 2] and natural["votes"] == [1.5, 0, 3, 1.5]
    overall, both = labels["g1"]["overall"], [labels["g1"][axis]["scores"] for axis in annotate.ASKED]
    assert overall["scores"] == pytest.approx(np.mean(both, axis=0), abs=1e-4) and overall["raters"] == 1
    again = [*lines, line("ann", "g1", four[::-1], "consistency", [1, 2, 3, 4], repeat_of="tg1")]
    assert annotate.human_labels(RECORDS, again) == labels, "repeats are no second vote"


# agreement ---------------------------------------------------------------------------------------------------

def test_agreement_is_that_of_a_plain_loop():
    rng, lines = np.random.default_rng(0), []
    answers = {name: [rng.choice(3, p=(0.5, 0.3, 0.2)) for _ in range(40)] for name in ("ann", "bob", "cyd")}
    for name, chosen in answers.items():
        for n, which in enumerate(chosen):
            lines.append(line(name, f"h{n}", [f"h{n}_0", f"h{n}_1"], "consistency", ([1, 2], [2, 1], [1, 1])[which]))
    equal, ties, pairs = 0, 0, 0
    for n in range(40):
        for one, other in (("ann", "bob"), ("ann", "cyd"), ("bob", "cyd")):
            equal += answers[one][n] == answers[other][n]
            ties += (answers[one][n] == 2) + (answers[other][n] == 2)
            pairs += 1
    share = ties / (2 * pairs)
    chance = share * share + (1 - share) / 2 * (1 - share) / 2 * 2
    kappa = (equal / pairs - chance) / (1 - chance)
    assert annotate.agreement(annotate.answered_twice(lines)) == f"{equal / pairs:.2f}, kappa {kappa:.2f} (120 pairs)"
    assert annotate.agreement([]) == "-"


def test_the_report_says_who_disagrees_with_whom():
    lines = []
    for name in ("ann", "bob"):
        work(lines, name, 34)
    for task in work([], "cyd", 30):                                        # always the left one, and at once
        lines += [line("cyd", task["group"], task["candidates"], axis, [1, 2], task=task["id"],
                       repeat_of=task["repeat_of"], seconds=0.4) for axis in task["open"]]
    text = annotate.report(RECORDS, lines, annotate.human_labels(RECORDS, lines))
    rows = [row.strip("| ").split(" | ") for row in text.splitlines() if row.startswith("|")]
    rows = {row[0]: row for row in rows}
    assert "5 of 5 LR images have labels, 5 on both axes" in text
    assert rows["ann"][5].startswith("1.00, kappa 1.00") and rows["cyd"][3] == "0.4"
    assert float(rows["cyd"][4][:4]) < 0.65 < float(rows["ann"][4][:4])


# the page over HTTP ------------------------------------------------------------------------------------------

@pytest.fixture
def folder(toy_run, tmp_path):
    return copy_toy(toy_run, tmp_path)


def test_nothing_is_served_without_the_token_and_no_path_leads_out(folder):
    with serving(folder) as client:
        place = urlsplit(client.base)
        root, token = f"http://{place.netloc}", place.path.strip("/")
        image = client.task("ann")["task"]["candidates"][0]
        for path in ("/", "/x/", f"/x/image/{image}", place.path.rstrip("/"), "/x/task?annotator=ann"):
            assert client.call(path, base=root)[0] == 403, path
        assert client.call("/x/judge", {"annotator": "ann"}, root)[0] == 403
        for path in (f"{token}/image/{'../' * 12}etc/passwd", f"{token}/../groups.jsonl", f"{token}/groups.jsonl",
                     f"{token}//etc/passwd", f"{token}/image/%2e%2e%2fgroups.jsonl",
                     f"{token}/image/lr/train_00000.png"):
            wire = http.client.HTTPConnection(place.netloc, timeout=30)
            wire.request("GET", "/" + path)                                 # sends dots as they are
            answer = wire.getresponse()
            assert answer.status == 404 and b"root:" not in answer.read(), path
        assert b"<!doctype html>" in client.call("")[1]
        assert client.call(f"image/{image}")[1].startswith(b"\x89PNG")


def test_bad_requests_write_nothing_and_an_answer_sent_twice_counts_once(folder, monkeypatch):
    with serving(folder) as client:
        task = client.task("ann")["task"]
        good = {"annotator": "ann", "task": task["id"], "axis": task["axis"], "ranks": [1, 2], "seconds": 1.0}
        for path in ("", "task", "image/x"):
            assert client.call(path, {"annotator": "ann"})[0] == 404
        for body in (b"", b"{", b"\xff\xfe", b"[]", b"[" * 9000, b'{"annotator": "ann"}'):
            assert client.call("judge", body)[0] == 400, body[:20]
        for change in ({"annotator": ""}, {"annotator": 3}, {"annotator": "a" * 41}, {"annotator": "a\nb"},
                       {"ranks": [1]}, {"ranks": [0, 1]}, {"ranks": [1, 3]}, {"ranks": "12"}, {"ranks": [True, 2]},
                       {"ranks": [1.0, 2]}, {"seconds": -1}, {"seconds": "1"}, {"seconds": math.nan}):
            assert client.call("judge", json.dumps(good | change).encode())[0] == 400, change
        for change in ({"task": "other"}, {"axis": "overall"}, {"annotator": "nobody"}):
            status, answer = client.call("judge", good | change)
            assert status == 409 and answer["task"] and answer["error"], change
        assert client.call("undo", {"annotator": "ann"})[0] == 409
        assert client.call("judge", b"x" * (annotate.LARGEST_BODY + 1))[0] == 413
        with monkeypatch.context() as patch:                                # a full disk
            patch.setattr(annotate.os, "fsync", lambda file: (_ for _ in ()).throw(OSError(28, "No space left")))
            status, answer = client.call("judge", good)
            assert status == 507 and "Not saved: No space left" in answer["error"]
        assert read_lines(folder) == [] and client.task("ann")["task"] == task
        assert client.call("judge", good)[0] == 200 and client.call("judge", good)[0] == 409
        assert len(read_lines(folder)) == 1


def test_what_travels_is_blind(folder):
    """Neither methods, nor files, nor ids of groups or candidates; but pictures as they are."""
    names = {word for group in all_groups(folder) for one in group["candidates"]
             for word in (one["method"], one["id"], one["path"], group["id"], group["source"])}
    with serving(folder, shown=4) as client:
        state, sent = client.task("ann"), []
        while state["task"]:
            sent.append(json.dumps(state))
            lr, smooth = (client.call(f"image/{state['task'][name]}")[1] for name in ("lr", "smooth"))
            state = client.answer("ann", state["task"], [1, 2, 3, 4])[1]
    assert len(sent) == 12 and not any(f'"{name}"' in text or f"/{name}" in text for name in names for text in sent)
    for name, content in (("smooth", smooth), ("lr", lr)):
        (folder / f"{name}.png").write_bytes(content)
    assert np.array_equal(read_image(folder / "smooth.png"), resize(read_image(folder / "lr.png"), (32, 32), "bicubic"))


def test_several_annotators_at_once_lose_nothing_and_undo_takes_back_the_own_last(folder):
    with serving(folder) as client:
        first = client.task("ann")
        second = client.answer("ann", first["task"], [1, 2])[1]
        assert not first["can_undo"] and second["can_undo"] and second["task"]["step"] == 2
        assert client.call("undo", {"annotator": "bob"})[0] == 409, "not what others said"
        back = client.call("undo", {"annotator": "ann"})[1]
        assert back["task"] == first["task"] and not back["can_undo"]
        failed, people = [], ("ann", "bob", "Zoe M. | 3", "cyd")

        def judge(name):
            state = client.task(name)
            for _ in range(25):
                status, state = client.answer(name, state["task"], [1, 2])
                failed.extend([status] * (status != 200))

        threads = [threading.Thread(target=judge, args=(name,)) for name in people]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = annotate.live(annotate.read_log(folder / annotate.LOG, all_groups(folder)))
    assert failed == [] and len(read_lines(folder)) == 102 and len({line["id"] for line in lines}) == 100
    assert Counter(line["annotator"] for line in lines) == dict.fromkeys(people, 25)
    assert len({(line["annotator"], line["task"], line["axis"]) for line in lines}) == 100


# the real command --------------------------------------------------------------------------------------------

@pytest.fixture
def build(folder, toy_config, capfd):
    """Run stage 01 on `folder` in this process: (exit status, stderr)."""
    return lambda *settings: (run_here(toy_config, f"run={folder.parent}", *settings), capfd.readouterr().err)


@contextmanager
def command(folder, toy_config):
    """`annotate=true` in a process of its own: a client with its `process`."""
    process = subprocess.Popen([sys.executable, "01_build_dataset.py", str(toy_config), f"run={folder.parent}",
                                "annotate=true"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    try:
        client = Client(next(row for row in process.stdout if row.startswith("open ")).split()[1])
        client.process = process
        yield client
    finally:
        process.kill()
        process.wait()


def test_kill_9_loses_nothing_and_the_same_command_goes_on(folder, toy_config, build):
    with command(folder, toy_config) as client:
        assert urlsplit(client.base).hostname == "127.0.0.1"
        state = client.task("ann")
        for _ in range(7):
            assert client.task("ann") == state, "a reload shows the same"
            status, state = client.answer("ann", state["task"], [2, 1])
            assert status == 200
        client.process.kill()
    lines = read_lines(folder)
    with open(folder / annotate.LOG, "a") as log:
        log.write('{"id": "half')                                           # as if the machine had gone down
    with command(folder, toy_config) as client:
        after = client.task("ann")
        assert [after["task"][key] for key in ("id", "axis")] == [state["task"][key] for key in ("id", "axis")]
        assert after["progress"] == state["progress"] and after["progress"]["mine"] == 4
        assert client.answer("ann", after["task"], None)[0] == 200
        code, error = build("annotate=true")
        assert code == 2 and "in use" in error
        client.process.send_signal(signal.SIGINT)
        words = client.process.communicate(timeout=60)[0]
        assert "8 lines" in words and "labels=human" in words
    assert read_lines(folder)[:7] == lines and len(read_lines(folder)) == 8


def test_judgements_become_labels_that_02_and_03_take_and_the_built_ones_come_back(folder, toy_config, build):
    """Some LR images are judged on one axis only, and some not at all."""
    before = {name: (folder / name).read_bytes() for name in ("groups.jsonl", "manifest.json", "contact_sheet.png")}
    code, error = build("labels=human")
    assert code == 2 and "annotate=true" in error
    expected = {}
    with annotate.open_log(folder / annotate.LOG) as log:
        for number, group in enumerate(all_groups(folder)):
            names = [one["id"] for one in group["candidates"]]
            for axis in annotate.ASKED[:1 if group["id"].endswith("00000") else 2] if number % 7 != 6 else ():
                ranks = metrics.ranks(group["labels"][axis]["scores"], 0.02)
                expected[group["id"], axis] = ranks
                said = line("ann", group["id"], names, axis, ranks, pictures=annotate.pictures_of(group))
                annotate.append(log, {key: value for key, value in said.items() if key not in ("id", "time")})
    assert build("labels=human")[0] == 0
    human = (folder / "groups.jsonl").read_bytes()
    labels = {group["id"]: group["labels"] for group in all_groups(folder)}
    assert {(name, axis): labels[name][axis]["ranks"] for name, axis in expected} == expected
    assert {tuple(label) for label in labels.values()} == {(), ("consistency",), metrics.AXES}
    assert json.loads((folder / "manifest.json").read_text())["results"]["label_source"] == "human"
    assert "| ann |" in (folder / "annotation_report.md").read_text()
    train, scale = load_cohorts(folder, all_groups(folder), "train")
    assert np.isnan(train[0].ranks[:, 1:]).all() and not any(map(len, scale)), "strengths of groups do not compare"
    for number, settings in (("02", ("cold_start_steps=2", "steps=1")), ("03", ("sampled_groups=0",))):
        done = run_stage(number, toy_config, f"run={folder.parent}", *settings)
        assert done.returncode == 0, done.stderr[-2000:]
    assert build("labels=human")[0] == 0 and (folder / "groups.jsonl").read_bytes() == human, "again: the same"
    assert build("labels=proxy")[0] == 0
    assert {name: (folder / name).read_bytes() for name in before} == before, "and back, byte by byte"


def test_a_log_of_another_build_and_wrong_settings_are_refused(folder, build):
    group = all_groups(folder)[0]
    said = line("ann", group["id"], [one["id"] for one in group["candidates"]], "consistency", [1, 2, 3, 4])
    (folder / annotate.LOG).write_text(json.dumps(said) + "\n")
    for settings, words in ((("labels=human",), "this file belongs to another build"),
                            (("annotate=true",), "judgements.jsonl line 1"),
                            (("annotate=true", "tie_margin=0.3"), "tie_margin: 0.05 -> 0.3"),
                            (("annotate_show=3",), "annotate_show"), (("labels=people",), "labels should be")):
        code, error = build(*settings)
        assert code == 2 and words in error, (settings, error)
