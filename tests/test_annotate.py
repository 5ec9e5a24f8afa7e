"""
What people say: which comparison comes next, the page over real HTTP, aggregation, agreement, labels.

Run     python -m pytest tests/test_annotate.py         # 1 min
"""
import http.client
import itertools
import json
import math
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections import defaultdict
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import spearmanr

from annotation_server import Server, build_small, read_lines, request, stage_folder
from common import agreement, annotate, human_labels, judgements, metrics, pairs
from common.groups import all_groups, common_scores, digit_targets, label_arrays, load_cohorts, method_prior
from common.images import read_image, resize
from conftest import ROOT, load_stage, run_stage

PICTURES = defaultdict(lambda: "0123456789abcdef")       # of any group
GROUPS = {f"g{i}": [f"g{i}_{c}" for c in range(4)] for i in range(5)}


# in memory: a person who answers by hidden scores ----------------------------------------------------------

def line(annotator, group, candidates, axis, ranks, **more):
    """A judgement as it lies in the file."""
    return {"id": str(next(NUMBER)), "time": 0.0, "annotator": annotator, "group": group, "pictures": PICTURES[group],
            "task": f"t{group}", "candidates": candidates, "axis": axis, "ranks": ranks, "seconds": 3.0,
            "repeat_of": None} | more


NUMBER = itertools.count()


def judge(annotator, task, axis, quality, margin=0.0):
    """The line that a person with these qualities {candidate: score} writes."""
    ranks = metrics.ranks([quality[name] for name in task["candidates"]], max(margin, 1e-9))
    return line(annotator, task["group"], task["candidates"], axis, ranks, task=task["id"], repeat_of=task["repeat_of"])


def work(lines, annotator, steps, *, shown=2, groups=GROUPS, quality=None):
    """Answer `steps` screens; the tasks, and lines grows."""
    quality = quality or {name: i for names in groups.values() for i, name in enumerate(names)}
    tasks = []
    for _ in range(steps):
        task = pairs.next_task(groups, lines, annotator, seed=0, shown=shown)
        if task is None:
            break
        tasks.append(task)
        lines += [judge(annotator, task, axis, quality) for axis in task["open"]]
    return tasks


def test_every_group_is_seen_once_before_any_is_seen_twice():
    tasks = [task for task in work([], "ann", 14) if not task["repeat_of"]]
    groups = [task["group"] for task in tasks]
    assert set(groups[:5]) == set(groups[5:10]) == set(GROUPS)
    shown = [frozenset(task["candidates"]) for task in tasks]
    assert len(set(shown)) == len(shown) and all(len(pair) == 2 for pair in shown)
    assert all(pair <= set(GROUPS[task["group"]]) for pair, task in zip(shown, tasks))


def test_the_choice_is_a_function_of_seed_annotator_and_judgements():
    first, second = ([], [])
    assert work(first, "ann", 9) == work(second, "ann", 9)
    assert len({json.dumps(pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2)) for lines in (first, second)}) == 1
    others = [pairs.next_task(GROUPS, [], name, seed=seed, shown=2) for seed in range(4) for name in ("ann", "bob")]
    assert len({json.dumps(task["candidates"]) for task in others}) > 3


def test_hidden_repeats_come_later_in_the_same_or_the_opposite_order():
    tasks = work([], "ann", 40)
    by_id = {task["id"]: index for index, task in enumerate(tasks)}
    repeats = [(index, task) for index, task in enumerate(tasks) if task["repeat_of"]]
    assert len(by_id) == len(tasks) and 3 <= len(repeats) <= 5
    orders = []
    for index, task in repeats:
        old = tasks[by_id[task["repeat_of"]]]
        assert index - by_id[task["repeat_of"]] > pairs.GAP and old["group"] == task["group"]
        orders.append({1: "same", -1: "swapped"}[1 if old["candidates"] == task["candidates"] else -1])
        assert sorted(old["candidates"]) == sorted(task["candidates"])
    assert {"same", "swapped"} == set(orders) and len({task["repeat_of"] for _, task in repeats}) == len(repeats)


def test_all_pairs_are_offered_then_nothing_and_first_those_that_connect():
    lines = []
    tasks = [task for task in work(lines, "ann", 100) if not task["repeat_of"]]
    assert len(tasks) == 5 * 6 and pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2) is None
    for group, names in GROUPS.items():
        own = [tuple(sorted(task["candidates"])) for task in tasks if task["group"] == group]
        assert len(set(judgements.components(names, set(own[:3])).values())) == 1, "three pairs connect four candidates"
    late = [task for task in tasks if tasks.index(task) >= 15]                   # the next after all are connected
    gaps = [abs(int(a[-1]) - int(b[-1])) for a, b in (task["candidates"] for task in late)]
    assert np.mean(gaps[:5]) <= np.mean(gaps[-5:])
    assert pairs.progress(GROUPS, lines, "ann") == {"mine": 34, "groups": 5, "seen": 5, "ranked": 5, "share": 1.0}


def test_four_at_once_and_what_another_person_has_judged():
    lines = []
    assert len(work(lines, "ann", 100, shown=4)) == 5
    assert len(work(lines, "bob", 2, shown=4)) == 2
    lines = []
    work(lines, "ann", 6)
    seen = {frozenset(task["candidates"]) for task in work([], "ann", 6)}
    tasks = work(lines, "bob", 12)
    assert frozenset(tasks[pairs.SHARED_AT]["candidates"]) in seen, "a pair for inter-annotator agreement"


def test_a_screen_that_was_begun_or_taken_back_comes_first():
    lines = []
    work(lines, "ann", 3)
    task = pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2)
    first, second = task["open"]
    lines.append(line("ann", task["group"], task["candidates"], first, [1, 2], task=task["id"]))
    assert pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2) == task | {"open": [second]}
    lines.append({"id": "u1", "time": 0.0, "annotator": "ann", "revokes": lines[-1]["id"]})
    assert pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2) == task
    before = judgements.live(lines)[-1]
    lines.append({"id": "u2", "time": 0.0, "annotator": "ann", "revokes": before["id"]})
    again = pairs.next_task(GROUPS, lines, "ann", seed=0, shown=2)
    assert again["id"] == before["task"] and again["open"] == [before["axis"]]
    assert [j["id"] for j in judgements.live(lines)] == [j["id"] for j in lines[:5]]


# aggregation against plain loops ---------------------------------------------------------------------------

def slow_loss(x, sizes, compared):
    """Minus the log posterior of Davidson's model, one comparison at a time."""
    strengths, log_nu = np.split(x[:-1], np.cumsum(sizes)[:-1]), x[-1]
    total = sum(float(s) ** 2 for own in strengths for s in own) / (2 * human_labels.PRIOR ** 2)
    for group, i, j, better in compared:
        a, b = math.exp(strengths[group][i]), math.exp(strengths[group][j])
        tie = math.exp(log_nu) * math.sqrt(a * b)
        total -= math.log({1: a, 0.5: tie, 0: b}[better] / (a + b + tie))
    return total


def test_fit_is_the_optimum_of_a_plain_loop():
    rng = np.random.default_rng(0)
    sizes = [4, 3, 4]
    compared = []
    for _ in range(60):
        group = int(rng.integers(3))
        i, j = (int(c) for c in rng.choice(sizes[group], 2, replace=False))
        compared.append((group, i, j, float(rng.choice([1, 1, 0.5, 0] if i < j else [1, 0.5, 0, 0]))))
    strengths, log_nu = human_labels.fit(sizes, compared)
    slow = minimize(slow_loss, np.zeros(12), args=(sizes, compared), method="BFGS", options={"gtol": 1e-6})
    assert np.allclose(np.append(np.concatenate(strengths), log_nu), slow.x, atol=1e-4)
    assert [len(own) for own in strengths] == sizes and all(abs(own.sum()) < 1e-4 for own in strengths)


def test_fit_finds_the_order_behind_noisy_answers():
    rng, truth = np.random.default_rng(1), np.array([2.0, 1.0, 0.0, -1.0, -2.0])
    compared = []
    for i, j in itertools.combinations(range(5), 2):
        for _ in range(30):
            odds = np.exp([(truth[i] - truth[j]) / 2, math.log(0.6), (truth[j] - truth[i]) / 2])
            compared.append((0, i, j, float(rng.choice([1, 0.5, 0], p=odds / odds.sum()))))
    (strengths,), log_nu = human_labels.fit([5], compared)
    assert np.abs(strengths - truth).max() < 0.4 and abs(log_nu - math.log(0.6)) < 0.25
    one, _ = human_labels.fit([2], [(0, 0, 1, 1.0)])
    assert 0.9 < one[0][0] - one[0][1] < 1.3, "one judgement pulls two candidates apart by about 1"


def test_rank_margin_is_where_half_prefer_the_better_one():
    for log_nu in (-2.0, 0.0, 1.5):
        gap = human_labels.rank_margin(log_nu)
        better, tie, worse = math.exp(gap / 2), math.exp(log_nu), math.exp(-gap / 2)
        assert better / (better + tie + worse) == pytest.approx(0.5)


def test_labels_only_where_the_comparisons_connect_all_candidates():
    a, b, c, d = GROUPS["g0"]
    lines = [line("ann", "g0", [a, b], "consistency", [1, 2]), line("ann", "g0", [c, b], "consistency", [2, 1]),
             line("bob", "g0", [c, d], "consistency", [1, 1]), line("bob", "g0", [a, b], "naturalness", [2, 1]),
             line("ann", "g1", ["g1_2", "g1_0", "g1_3", "g1_1"], "naturalness", [1, 2, 2, 3]),
             line("ann", "g1", ["g1_2", "g1_0", "g1_3", "g1_1"], "consistency", [1, 2, 3, 4]),
             line("ann", "g2", ["g2_0", "g2_1", "g2_2", "g2_3"], "naturalness", None)]
    labels = human_labels.aggregate(GROUPS, lines)
    assert set(labels["g0"]) == {"consistency"} and set(labels["g1"]) == set(metrics.AXES) and not labels["g2"]
    assert labels["g0"]["consistency"]["ranks"][:2] == [1, 2] and labels["g0"]["consistency"]["votes"] == 3
    assert labels["g1"]["consistency"]["ranks"] == [2, 4, 1, 3]
    assert labels["g1"]["naturalness"]["ranks"] == [2, 3, 1, 2]
    overall, both = labels["g1"]["overall"], [labels["g1"][axis]["scores"] for axis in judgements.ASKED]
    assert overall["scores"] == pytest.approx(np.mean(both, axis=0), abs=1e-4) and overall["votes"] == 2
    again = [*lines, line("ann", "g1", ["g1_1", "g1_3", "g1_0", "g1_2"], "consistency", [1, 2, 3, 4], repeat_of="tg1")]
    assert human_labels.aggregate(GROUPS, again) == labels, "hidden repeats have no second vote"


def test_how_often_a_group_was_judged_does_not_change_what_its_candidates_teach():
    """Of two groups with the same order one was judged five times as often: its strengths lie farther apart."""
    lines = []
    for group, times in (("g0", 1), ("g1", 5)):
        names = GROUPS[group]
        lines += [line(f"a{n}", group, names, "consistency", [1, 2, 3, 4]) for n in range(times)]
    few, many = (human_labels.aggregate(GROUPS, lines)[group]["consistency"] for group in ("g0", "g1"))
    assert np.ptp(many["scores"]) > 1.5 * np.ptp(few["scores"])
    groups = [{"id": name, "candidates": [{"method": f"m{i}"} for i in range(4)], "labels": {"consistency": own}}
              for name, own in (("few", few), ("many", many))]
    arrays = label_arrays(groups)
    assert np.isnan(arrays.scores).all()
    scale = np.sort([s for own in (few, many) for s in common_scores(own)])
    for own in (few, many):
        assert digit_targets(own, scale).tolist() == pytest.approx([9, 9 - 8 / 3, 1 + 8 / 3, 1])
    assert method_prior(groups, groups)[0, :, 0].tolist() == [-1, -2, -3, -4]
    proxy = {"ranks": [1, 2], "scores": [0.9, 0.2], "source": "proxy", "votes": None}
    assert digit_targets(proxy, np.array([0.2, 0.9])).tolist() == [7, 3]
    assert digit_targets({"ranks": [1, 1, 1]}, scale).tolist() == [5, 5, 5]


# agreement -------------------------------------------------------------------------------------------------

def test_kappa_and_pair_agreement_by_hand():
    a, b = "g0_0", "g0_1"
    lines = [line("ann", "g0", [a, b], "consistency", [1, 2]), line("bob", "g0", [b, a], "consistency", [2, 1]),
             line("cyd", "g0", [a, b], "consistency", [1, 1]), line("ann", "g0", [a, b], "naturalness", [2, 1])]
    found = agreement.report(GROUPS, lines, [])["axes"]["consistency"]["between_annotators"]
    ties = 2 / 6                                                            # cyd's tie is in two of the three pairs
    chance = ties ** 2 + (1 - ties) ** 2 / 2
    assert found == {"pairs": 3, "rate": 0.3333, "kappa": pytest.approx((1 / 3 - chance) / (1 - chance), abs=1e-4)}


def test_agreement_at_random_is_corrected_to_zero():
    rng, lines = np.random.default_rng(0), []
    for number in range(1500):
        for name in ("ann", "bob"):
            ranks = ([1, 2], [2, 1], [1, 1])[rng.choice(3, p=(0.4, 0.4, 0.2))]
            lines.append(line(name, f"h{number}", [f"h{number}_0", f"h{number}_1"], "consistency", ranks))
    assert abs(agreement.rate([item[3:] for item in agreement.shared_pairs(lines)])["kappa"]) < 0.06


def test_kendalls_w_by_hand():
    rankings = np.array([[1, 2, 3, 4], [1, 2, 3, 4], [2, 1, 3, 4.0]])
    sums = rankings.sum(0)
    by_hand = 12 * ((sums - sums.mean()) ** 2).sum() / (3 ** 2 * (4 ** 3 - 4))
    assert agreement.kendall_w(rankings) == pytest.approx(by_hand)
    assert agreement.kendall_w(np.ones((2, 3))) is None
    four = [line(name, "g0", GROUPS["g0"], "consistency", ranks) for name, ranks in
            (("ann", [1, 2, 3, 4]), ("bob", [1, 2, 3, 4]), ("cyd", [2, 1, 3, 4]))]
    assert agreement.concordance(GROUPS, four, "consistency") == {"groups": 1, "kendall_w": round(by_hand, 4)}
    assert agreement.concordance(GROUPS, four, "naturalness") == {"groups": 0, "kendall_w": None}


def test_a_careless_annotator_is_doubted_and_careful_ones_are_not():
    groups = {f"g{i}": [f"g{i}_{c}" for c in range(4)] for i in range(30)}
    lines = []
    for name in ("ann", "bob"):
        work(lines, name, 90, groups=groups)
    rng = np.random.default_rng(0)
    for _ in range(90):
        task = pairs.next_task(groups, lines, "cyd", seed=0, shown=2)
        lines += [line("cyd", task["group"], task["candidates"], axis, [1, 2] if rng.random() < 0.75 else [2, 1],
                       task=task["id"], repeat_of=task["repeat_of"], seconds=0.4) for axis in task["open"]]
    found = agreement.report(groups, lines, ["cyd"])
    assert found["annotators"]["ann"]["doubts"] == found["annotators"]["bob"]["doubts"] == []
    assert found["annotators"]["ann"]["with_oneself"]["rate"] == 1
    doubts = " ".join(found["annotators"]["cyd"]["doubts"])
    assert "agrees with others" in doubts and "prefers the left" in doubts and "0.4 seconds" in doubts
    told = {"labeled_groups": {"train": 1}, "labeled_overall": 1, "pairs": 3}
    text = agreement.markdown(found | {"labels": told})
    assert "| cyd |" in text and "left out of the labels; " in text


# the file --------------------------------------------------------------------------------------------------

def test_a_cut_last_line_is_dropped_and_anything_else_is_named(tmp_path, capsys):
    path = tmp_path / "judgements.jsonl"
    assert judgements.read(path, GROUPS, PICTURES) == []
    with judgements.open_log(path) as log:
        own = line("ann", "g0", GROUPS["g0"][:2], "consistency", [1, 1])
        del own["id"]
        first = judgements.append(log, own)
        with pytest.raises(SystemExit):
            judgements.open_log(path)                                       # a second server on the same run
        assert "in use" in capsys.readouterr().err
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"id": "x", "time"')
    assert judgements.read(path, GROUPS, PICTURES) == [first]
    with judgements.open_log(path) as log:
        judgements.append(log, {"time": 0.0, "annotator": "ann", "revokes": first["id"]})
    lines = judgements.read(path, GROUPS, PICTURES)
    assert path.read_bytes().startswith(whole) and len(lines) == 2 and judgements.live(lines) == []
    older = {key: value for key, value in first.items() if key != "pictures"} | {"id": "older"}
    path.write_bytes(whole + json.dumps(older).encode() + b"\n")
    assert judgements.read(path, GROUPS, PICTURES) == [first, older]           # what people said is not lost
    for wrong, word in (("nonsense\n", "JSON"), ("[]\n", "keys"), ('{"id": 1}\n', "keys"),
                        (json.dumps(first | {"group": "g9"}) + "\n", "g9"),
                        (json.dumps(first | {"pictures": "0" * 16}) + "\n", "another build"),
                        (json.dumps(first | {"ranks": [1, 3]}) + "\n", "ranks"),
                        (json.dumps(first | {"candidates": ["g1_0", "g1_1"]}) + "\n", "candidates"),
                        (json.dumps({"id": "1", "time": 0, "annotator": "a", "revokes": "q"}) + "\n", "above")):
        path.write_bytes(whole + wrong.encode())
        with pytest.raises(SystemExit):
            judgements.read(path, GROUPS, PICTURES)
        error = capsys.readouterr().err
        assert "line 2" in error and word in error and error.count("\n") == 1


@pytest.mark.parametrize("ranks, fine", [([1, 2], True), ([1, 1], True), ([2, 1], True), ([0, 1], False),
                                         ([1, 3], False), ([2, 2], False), ([1], False), ([True, 2], False),
                                         ("12", False), ([1.0, 2], False), ([1, None], False)])
def test_ranks_that_are_accepted(ranks, fine):
    assert (judgements.wrong_ranks(ranks, 2) is None) == fine


# the page over HTTP, served by the real command ------------------------------------------------------------

@pytest.fixture(scope="module")
def built(tmp_path_factory) -> Path:
    return build_small(tmp_path_factory.mktemp("built"))


@pytest.fixture
def config(built, tmp_path) -> Path:
    """A copy of the small data set, nobody has judged it."""
    tree = json.loads(built.read_text())
    shutil.copytree(tree["run"], tmp_path / "run")
    path = tmp_path / "config.yaml"
    path.write_text(json.dumps(tree | {"run": str(tmp_path / "run")}))
    return path


def quality_of(config) -> dict[str, dict[str, float]]:
    """PNG bytes -> proxy score per axis: what the person in these tests has in mind when looking at a picture."""
    folder = stage_folder(config)
    return {(folder / candidate["path"]).read_bytes(): {axis: group["labels"][axis]["scores"][i]
                                                        for axis in judgements.ASKED}
            for group in all_groups(folder) for i, candidate in enumerate(group["candidates"])}


def look(server, task, quality, seen) -> list[int]:
    """Ranks of what is shown, by the pictures that the server sends; seen: those that were fetched before."""
    for name in task["candidates"]:
        seen[name] = seen[name] if name in seen else server.call(f"image/{name}")[1]
    return metrics.ranks([quality[seen[name]][task["axis"]] for name in task["candidates"]], 0.02)


def raw(server, text: bytes) -> bytes:
    """The start of the answer to bytes that no HTTP library would send."""
    place = urlsplit(server.base)
    with socket.create_connection((place.hostname, place.port), timeout=30) as wire:
        wire.sendall(text)
        return wire.recv(200)


def test_without_the_token_nothing_is_served_and_no_path_leads_out(config):
    with Server(config) as server:
        place = urlsplit(server.base)
        assert place.hostname == "127.0.0.1" and len(place.path.strip("/")) >= 20
        root = f"{place.scheme}://{place.netloc}"
        image = server.task("ann")["task"]["candidates"][0]
        for path in ("/", "/x/", f"/x/image/{image}", "/favicon.ico", place.path.rstrip("/"), "/x/task?annotator=ann"):
            assert request(root + path)[0] == 403, path
        assert request(root + "/x/judge", {"annotator": "ann"})[0] == 403
        token = place.path.strip("/")
        secret = "../" * 12 + "etc/passwd"
        for path in (f"{token}/image/{secret}", f"{token}/../groups.jsonl", f"{token}/groups.jsonl",
                     f"{token}//etc/passwd",
                     f"{token}/image/%2e%2e%2fgroups.jsonl", f"{token}/image/lr/train_00000.png", f"{token}/image/"):
            wire = http.client.HTTPConnection(place.hostname, place.port, timeout=30)
            wire.request("GET", "/" + path)                                 # sends dots as they are
            answer = wire.getresponse()
            assert answer.status == 404 and b"root:" not in answer.read(), path
        status, page = server.call("")
        assert status == 200 and b"<!doctype html>" in page
        assert server.call(f"image/{image}")[1].startswith(b"\x89PNG")
        assert not (stage_folder(config) / "judgements.jsonl").read_bytes()


def test_bad_requests_get_4xx_and_write_nothing(config):
    with Server(config) as server:
        task = server.task("ann")["task"]
        good = {"annotator": "ann", "task": task["id"], "axis": task["axis"], "ranks": [1, 2], "seconds": 1.0}
        for path in ("", "task", "image/x", "nothing"):
            assert server.call(path, {"annotator": "ann"})[0] == 405, path
        for path in ("judge", "undo"):
            assert server.call(path)[0] == 405
        for method in ("PUT", "DELETE", "PATCH", "OPTIONS", "HEAD"):
            assert server.call("judge", good, method)[0] == 405, method
        for body in (b"", b"{", b"\xff\xfe", b"null", b"[]", b"3", b"[" * 9000, b'{"annotator": "ann"}',
                     json.dumps(good | {"more": 1}).encode()):
            assert server.call("judge", body)[0] == 400, body[:20]
        for change in ({"annotator": ""}, {"annotator": 3}, {"annotator": " ann"}, {"annotator": "a" * 41},
                       {"annotator": "a\nb"}, {"ranks": [1]}, {"ranks": [0, 1]}, {"ranks": "12"}, {"ranks": [1, 2, 3]},
                       {"seconds": -1}, {"seconds": "1"}, {"seconds": math.inf}, {"seconds": math.nan},
                       {"seconds": True}, {"seconds": 10 ** 30}):
            status, answer = server.call("judge", json.dumps(good | change).encode())
            assert status == 400 and answer["error"], change
        for change in ({"task": "other"}, {"task": None}, {"axis": "overall"}, {"annotator": "nobody"}):
            status, answer = server.call("judge", good | change)
            assert status == 409 and answer["task"] and answer["error"], change
        assert server.call("undo", {"annotator": "ann"})[0] == 409
        assert server.call("task")[0] == server.call("task?annotator=%00")[0] == 400
        assert server.call("judge", b"x" * (annotate.LARGEST_BODY + 1))[0] == 413
        path = urlsplit(server.base).path.encode()
        for head in (b"", b"Content-Length: -5\r\n", b"Content-Length: x\r\n", b"Transfer-Encoding: chunked\r\n"):
            answer = raw(server, b"POST " + path + b"judge HTTP/1.1\r\nHost: x\r\n" + head + b"\r\n{}")
            assert answer.startswith(b"HTTP/1.1 411"), head
        assert raw(server, b"POST " + path + b"judge HTTP/1.1\r\nContent-Length: 9999999999999\r\n\r\n")[9:12] == b"413"
        assert read_lines(config) == []
        assert server.call("judge", good)[0] == 200 and len(read_lines(config)) == 1
        assert server.call("judge", good)[0] == 409, "sent twice: counted once"
        assert len(read_lines(config)) == 1


def test_what_travels_is_blind(config):
    """Neither methods, nor files, nor ids of groups or candidates; but pictures as they are."""
    folder = stage_folder(config)
    names = {word for group in all_groups(folder) for candidate in group["candidates"]
             for word in (candidate["method"], candidate["id"], candidate["path"], group["id"], group["source"])}
    with Server(config) as server:
        sent = [server.call("")[1].decode()]
        task = server.task("ann")
        for _ in range(12):
            sent.append(json.dumps(task))
            task = server.answer("ann", task["task"], [1, 2])[1]
        pictures = [server.call(f"image/{task['task'][name]}")[1] for name in ("lr", "smooth")]
        wire = http.client.HTTPConnection(urlsplit(server.base).netloc, timeout=30)
        wire.request("GET", urlsplit(server.base).path + f"image/{task['task']['lr']}")
        answer = wire.getresponse()
        sent.append(str(answer.getheaders()))
        assert answer.getheader("Content-Security-Policy") and answer.getheader("Referrer-Policy") == "no-referrer"
        assert pictures[0] == answer.read()
    for name in names:
        assert not any(f'"{name}"' in text or f"/{name}" in text for text in sent), name
    assert not any(word in text for text in sent[1:] for word in ("train", "test", "candidates/", ".png", "hr"))
    (tmp := folder.parent / "smooth.png").write_bytes(pictures[1])
    (small := folder.parent / "lr.png").write_bytes(pictures[0])
    assert np.array_equal(read_image(tmp), resize(read_image(small), (32, 32), "bicubic"))


def test_kill_9_loses_nothing_and_a_reload_goes_on(config):
    with Server(config) as server:
        state = server.task("ann")
        for _ in range(7):
            assert server.task("ann") == state, "a reload shows the same"
            status, state = server.answer("ann", state["task"], [2, 1])
            assert status == 200
        server.stop(signal.SIGKILL)
    lines = read_lines(config)
    assert len(lines) == 7 and len({line["id"] for line in lines}) == 7
    path = stage_folder(config) / "judgements.jsonl"
    path.write_bytes(path.read_bytes() + b'{"id": "half')                   # as if the machine had gone down
    with Server(config) as server:
        after = server.task("ann")
        assert after["task"]["id"] == state["task"]["id"] and after["task"]["axis"] == state["task"]["axis"]
        assert after["progress"] == state["progress"] and after["progress"]["mine"] == 4
        assert server.answer("ann", after["task"], None)[0] == 200
        second = subprocess.run([sys.executable, "01_build_dataset.py", str(config), "annotate=true"], cwd=ROOT,
                                capture_output=True, text=True, timeout=120)
        assert second.returncode == 2 and "in use" in second.stderr and second.stderr.count("\n") == 1
        words = server.stop()
        assert "8 lines" in words and "labels=human" in words
    assert read_lines(config)[:7] == lines and len(read_lines(config)) == 8


def test_an_answer_on_a_full_disk_is_one_answer(config):
    with Server(config) as server:
        state = server.task("ann")
        state = server.answer("ann", state["task"], [1, 2])[1]
        path, pid = stage_folder(config) / "judgements.jsonl", server.process.pid
        before = path.read_bytes()
        for room in (0, 40):                                                # nothing, and a part of the line
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (len(before) + room, resource.RLIM_INFINITY))
            for _ in range(2):
                status, answer = server.answer("ann", state["task"], [1, 2])
                assert status == 507 and "Not saved: " in answer["error"]
                assert path.read_bytes() == before
            assert server.call("undo", {"annotator": "ann"})[0] == 507
            assert server.task("ann") == state, "the question stays"
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY,) * 2)
        assert server.answer("ann", state["task"], [2, 1])[0] == 200
        server.stop()
    assert [line["ranks"] for line in read_lines(config)] == [[1, 2], [2, 1]]


def test_the_address_for_others_is_one_that_they_can_open(config):
    with Server(config, "annotate_host=0.0.0.0") as server:
        assert urlsplit(server.base).hostname == socket.gethostname().lower()
        server.base = server.base.replace(urlsplit(server.base).netloc, f"127.0.0.1:{urlsplit(server.base).port}")
        assert server.task("ann")["task"]


def test_several_annotators_at_once_lose_nothing(config):
    with Server(config) as server:
        failed = []

        def person(name):
            state = server.task(name)
            for _ in range(25):
                status, state = server.answer(name, state["task"], [1, 2])
                failed.extend([status] * (status != 200))

        threads = [threading.Thread(target=person, args=(name,)) for name in ("ann", "bob", "Zoe M. | 3", "cyd")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    lines = read_lines(config)
    assert failed == [] and len(lines) == 100 and len({line["id"] for line in lines}) == 100
    for name in ("ann", "bob", "Zoe M. | 3", "cyd"):
        own = [(line["task"], line["axis"]) for line in lines if line["annotator"] == name]
        assert len(own) == len(set(own)) == 25


def test_undo_over_http(config):
    with Server(config) as server:
        first = server.task("ann")
        second = server.answer("ann", first["task"], [1, 2])[1]
        assert not first["can_undo"] and second["can_undo"] and second["task"]["step"] == 2
        assert server.call("undo", {"annotator": "bob"})[0] == 409, "not what others said"
        status, back = server.call("undo", {"annotator": "ann"})
        assert status == 200 and back["task"] == first["task"] and not back["can_undo"]
        third = server.answer("ann", back["task"], [2, 1])[1]
        assert third["task"]["id"] == first["task"]["id"] and third["task"]["axis"] == second["task"]["axis"]
    lines = read_lines(config)
    assert [set(line) for line in lines] == [judgements.KEYS, judgements.UNDO_KEYS, judgements.KEYS]
    assert [line["ranks"] for line in judgements.live(lines)] == [[2, 1]]


# labels ----------------------------------------------------------------------------------------------------

def ordered_pairs(groups) -> int:
    """Pairs whose overall labels are no tie."""
    return sum(a != b for group in groups for a, b in itertools.combinations(group["labels"]["overall"]["ranks"], 2))


def test_a_small_real_set_is_ranked_through_the_page_and_becomes_labels(config, shown=2):
    folder, quality = stage_folder(config), quality_of(config)
    before = {name: (folder / name).read_bytes() for name in
              ("groups.jsonl", "manifest.json", "contact_sheet.png")}
    early = run_stage("01", config, "labels=human")
    assert early.returncode == 2 and "annotate=true" in early.stderr and early.stderr.count("\n") == 1
    assert (folder / "groups.jsonl").read_bytes() == before["groups.jsonl"]
    seen = {}
    with Server(config, f"annotate_show={shown}") as server:
        for name, screens in (("ann", 70), ("bob", 8)):
            state = server.task(name)
            for _ in range(2 * screens):
                if state["task"]:
                    state = server.answer(name, state["task"], look(server, state["task"], quality, seen))[1]
        assert server.task("ann")["task"] is None and server.task("ann")["progress"]["share"] == 1
    done = run_stage("01", config, "labels=human")
    assert done.returncode == 0, done.stderr
    groups = all_groups(folder)
    proxies, people = [], []
    for group, line in zip(groups, before["groups.jsonl"].splitlines()):
        old = json.loads(line)
        assert group["proxy_labels"] == old["labels"] and set(group["labels"]) == set(metrics.AXES)
        assert {key: value for key, value in group.items() if key not in ("labels", "proxy_labels")} == \
            {key: value for key, value in old.items() if key != "labels"}
        for axis in judgements.ASKED:
            own = group["labels"][axis]
            assert own["source"] == "human" and own["votes"] >= 1 and min(own["ranks"]) == 1
            proxies.append(np.array(old["labels"][axis]["scores"]))
            people.append(np.array(own["scores"]))
    found = [spearmanr(a, b).statistic for a, b in zip(proxies, people) if np.ptp(a) > 0.1]
    assert np.mean(found) > 0.9, "the person answered by the proxy, so the labels order like it"
    results = json.loads((folder / "manifest.json").read_text())["results"]
    assert results["label_source"] == "human" and results["labeled_groups"] == {"train": 4, "val": 2, "test": 3}
    assert results["method_prior"]["overall"] is not None and results["pairs"] == ordered_pairs(groups)
    report = json.loads((folder / "annotation_report.json").read_text())
    assert report["annotators"]["ann"]["with_oneself"]["rate"] == 1 or shown == 4
    assert report["axes"]["consistency"]["between_annotators"]["rate"] == 1
    assert "| bob |" in (folder / "annotation_report.md").read_text()
    human = (folder / "groups.jsonl").read_bytes()
    assert run_stage("01", config, "labels=human").returncode == 0
    assert (folder / "groups.jsonl").read_bytes() == human, "again: the same"
    assert "is finished" in run_stage("01", config).stdout and (folder / "groups.jsonl").read_bytes() == human
    assert run_stage("01", config, "labels=proxy").returncode == 0
    assert {name: (folder / name).read_bytes() for name in before} == before, "and back, byte by byte"


def test_judgements_of_another_build_are_refused(config, tmp_path):
    """The same ids are in every data set: here the same LR images, and other candidates."""
    with Server(config) as server:
        assert server.answer("ann", server.task("ann")["task"], [1, 2])[0] == 200
        server.stop()
    tree = json.loads(config.read_text())
    tree["run"], tree["01_build_dataset"]["candidates"] = str(tmp_path / "other"), ["resample|unnatural"] * 4
    config.with_name("other.yaml").write_text(json.dumps(tree))
    folder = tmp_path / "other" / "01_build_dataset"
    folder.mkdir(parents=True)
    shutil.copy(stage_folder(config) / "judgements.jsonl", folder)
    done = run_stage("01", config.with_name("other.yaml"))
    assert done.returncode == 0, done.stderr
    for setting in ("labels=human", "annotate=true"):
        done = run_stage("01", config.with_name("other.yaml"), setting)
        assert done.returncode == 2 and "this file belongs to another build" in done.stderr
        assert "judgements.jsonl line 1" in done.stderr and "human" not in (folder / "groups.jsonl").read_text()


def test_who_is_left_out_and_what_is_refused(config):
    with Server(config, "annotate_show=4", "annotate_groups=1", "annotate_splits=val,test") as server:
        for name in ("ann", "bob"):
            state = server.task(name)
            while state["task"]:
                state = server.answer(name, state["task"], [1, 2, 3, 4] if name == "ann" else [4, 3, 2, 1])[1]
            assert state["progress"] == {"mine": 2, "groups": 2, "seen": 2, "ranked": 2, "share": 1.0}
    folder = stage_folder(config)
    assert not any(line["group"].startswith("train") for line in read_lines(config))
    unknown = run_stage("01", config, "labels=human", "annotate_without=eve")
    assert unknown.returncode == 2 and "eve" in unknown.stderr
    assert run_stage("01", config, "labels=human", "annotate_without=bob").returncode == 0
    lines = {line["group"]: line for line in read_lines(config) if line["annotator"] == "ann"}
    for group in all_groups(folder):
        if group["id"] in lines:
            shown = dict(zip(lines[group["id"]]["candidates"], (1, 2, 3, 4)))
            assert group["labels"]["overall"]["ranks"] == [shown[c["id"]] for c in group["candidates"]]
        else:
            assert group["labels"] == {}
    assert "left out of the labels" in (folder / "annotation_report.md").read_text()
    changed = run_stage("01", config, "annotate=true", "tie_margin=0.3")
    assert changed.returncode == 2 and "tie_margin: 0.05 -> 0.3" in changed.stderr
    for wrong in ("annotate_show=3", "labels=people", "annotate_port=99999", "annotate_groups=-1",
                  "annotate_splits=tset"):
        assert run_stage("01", config, wrong).returncode == 2


def test_02_and_03_work_where_people_have_judged_only_some_groups_and_axes(toy_run, toy_config, tmp_path):
    source = tmp_path / "01_build_dataset"
    shutil.copytree(toy_run / source.name, source)
    groups = all_groups(source)
    with judgements.open_log(source / judgements.NAME) as log:
        for number, group in enumerate(groups):
            shown = judgements.pictures_of(group)
            names = [candidate["id"] for candidate in group["candidates"]]
            for axis in judgements.ASKED[:1 if group["id"].endswith("00000") else 2]:       # the first of a split: one
                own = line("ann", group["id"], names, axis, metrics.ranks(group["labels"][axis]["scores"], 0.02),
                           pictures=shown)
                del own["id"]
                if number % 7 != 6:                                                         # some are not seen at all
                    judgements.append(log, own)
    for kind in ("human", "proxy", "human"):
        human_labels.set_labels(source, kind, [], load_stage("01").publish)
    kinds = {tuple(group["labels"]) for group in all_groups(source)}
    assert kinds == {(), ("consistency",), metrics.AXES}
    train, scale = load_cohorts(source, "train")
    assert len(train) == 24 - 24 // 7 and np.isnan(train[0].ranks[:, 1:]).all() and not np.isnan(train[1].ranks).any()
    assert not any(map(len, scale)), "strengths of different groups do not compare"
    for axis in range(3):
        assert {(c.targets[:, axis].min(), c.targets[:, axis].max()) for c in train[1:]} <= {(1, 9), (5, 5)}
    for number, settings in (("02", ("cold_start_steps=6", "steps=2", "eval_every=2")),
                             ("03", ("sampled_groups=0",))):
        done = run_stage(number, toy_config, f"run={tmp_path}", *settings)
        assert done.returncode == 0, done.stderr[-2000:]
    lines = [json.loads(row) for row in (tmp_path / "02_train_reward" / "metrics.jsonl").read_text().splitlines()]
    shown = [row for row in lines if "val_pair_accuracy" in row]
    assert shown and all({f"val_{axis}_accuracy" for axis in metrics.AXES} <= set(row) for row in shown)
    results = json.loads((tmp_path / "03_eval_reward" / "results.json").read_text())
    assert "human" in results["summary"] and "proxy" not in results["summary"]
    assert {"judge", "method_prior", "psnr"} <= set(results["accuracy"])
    assert all(results["accuracy"]["judge"][axis]["value"] is not None for axis in metrics.AXES)
