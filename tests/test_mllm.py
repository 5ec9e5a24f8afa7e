"""
The judge as a reader and a writer: parser, prompt, expected scores, replies and their log-probabilities.

What it computes is compared with transformers' own forward pass over one plain row, on a tiny Qwen2.5-VL.

Run     python -m pytest tests/test_mllm.py         # 25 s
"""

import itertools
import json
import math
import shutil

import numpy as np
import pytest
import torch

from common import candidates, mllm, run, token_tree
from common.metrics import AXES
from common.mllm import Judge
from common.replies import answer_logp, draw, sample_replies
from conftest import build_judge, make_images

GOOD = "<thinking>close; fair</thinking><answer>consistency: 7, naturalness: 4, overall: 5</answer>"
SCORES = {"consistency": 7, "naturalness": 4, "overall": 5}
ANSWER = GOOD[GOOD.index("<answer>"):]
REFUSED = {
    "empty": "",
    "blank": " \n",
    "no tag at all": "consistency: 7, naturalness: 4, overall: 5",
    "prose": "I would give this image 7 out of 9 for consistency.",
    "refusal": "I'm sorry, but I cannot rate images.",
    "no thinking": ANSWER,
    "no answer": "<thinking>close; fair</thinking>",
    "cut short": GOOD[:-4],
    "end tag missing": GOOD.removesuffix("</answer>"),
    "thinking not closed": GOOD.replace("</thinking>", ""),
    "text before": "Sure! " + GOOD,
    "text after": GOOD + " I hope this helps.",
    "newline after": GOOD + "\n",
    "end token left in": GOOD + "<|im_end|>",
    "two replies": GOOD * 2,
    "two answers": GOOD + ANSWER,
    "an answer inside the thinking": GOOD.replace("close", ANSWER),
    "thinking inside thinking": GOOD.replace("close", "<thinking>close"),
    "answer inside answer": GOOD.replace("<answer>", "<answer><answer>"),
    "score 0": GOOD.replace("7", "0"),
    "score 10": GOOD.replace("7", "10"),
    "score -7": GOOD.replace("7", "-7"),
    "score 7.5": GOOD.replace("7", "7.5"),
    "score 7/9": GOOD.replace("7", "7/9"),
    "a word as score": GOOD.replace("7", "seven"),
    "Arabic digit": GOOD.replace("7", "\u0667"),
    "full-width digit": GOOD.replace("7", "\uff17"),
    "superscript digit": GOOD.replace("7", "\u2077"),
    "axis missing": GOOD.replace(", overall: 5", ""),
    "axis twice": GOOD.replace("overall", "consistency"),
    "axes in another order": GOOD.replace("consistency: 7, naturalness: 4", "naturalness: 4, consistency: 7"),
    "capitals": GOOD.replace("consistency", "Consistency"),
    "other spaces": GOOD.replace(": 7", ":  7"),
    "100 kB of open tags": "<thinking>" * 10_000,
    "100 kB of text, then nothing": "<thinking>" + "a" * 100_000,
    "100 kB of answers": ANSWER * 1_500}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return build_judge()[0]


# parser and prompt -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_in_any_other_form_has_no_score(name):
    assert mllm.parse_reply(REFUSED[name]) is None              # with backtracking 100 kB would take hours


def test_replies_in_the_asked_form():
    assert mllm.parse_reply(GOOD) == SCORES
    for thought in ("", "two\nlines", "a < b > c & </b>", "7, 8, 9", "\u0667 \u4f60\u597d", "x" * 100_000):
        assert mllm.parse_reply(GOOD.replace("close; fair", thought)) == SCORES


def test_composed_replies_parse_to_their_targets(judge):
    methods = ("hr", "", "warp+blur", *candidates.INCONSISTENT, *candidates.UNNATURAL)
    levels = (1, 1.49, 4.8, 5, 9, 9.4)
    for i, targets in enumerate(itertools.product(levels, repeat=3)):
        reply = mllm.compose_reply(np.array(targets), methods[i % len(methods)])
        wanted = dict(zip(AXES, (int(min(round(target), 9)) for target in targets)))
        ids = judge.encode(reply)
        assert ids[-1] == judge.end_id and judge.end_id not in ids[:-1]
        assert mllm.reply_text(judge, ids) + "<|im_end|>" == reply
        assert mllm.parse_reply(mllm.reply_text(judge, ids)) == wanted
        assert mllm.parse_reply(mllm.reply_text(judge, ids[:-3])) is None
    nan = mllm.compose_reply(np.array([np.nan, 3.0, np.nan]), "hr").removesuffix("<|im_end|>")
    assert mllm.parse_reply(nan) == dict.fromkeys(AXES, 3)      # unknown axes repeat what is known


def prompt_ids(judge: Judge, grids: torch.Tensor) -> list[int]:
    """The prompt as one text, cut into tokens as a whole; grids [2, 3] of LR and candidate."""
    lr, candidate = ("<|image_pad|>" * int(n) for n in grids.prod(1) // 4)
    return judge.encode(f"<|im_start|>user\n{mllm.INSTRUCTION}\n<|vision_start|>{lr}<|vision_end|>\n"
                        f"<|vision_start|>{candidate}<|vision_end|><|im_end|>\n<|im_start|>assistant\n")


def test_a_changed_prompt_changes_the_version(judge):
    assert mllm.PROMPT_VERSION == 1
    assert mllm.INSTRUCTION == (
        "Image 1 is the low-resolution input, image 2 a super-resolved candidate. Score each from 1 to 9: "
        "consistency of image 2 with image 1, naturalness of image 2, overall. "
        "Reply <thinking>why</thinking><answer>consistency: d, naturalness: d, overall: d</answer>")
    assert [judge.tokenizer.decode(stem) for stem in judge.stems] == [f"<answer>{axis}: " for axis in AXES]
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    pieces = [token for segment in mllm.prompt_row(judge, grids[0], grids[1:]) for token in segment.ids]
    assert pieces == prompt_ids(judge, grids)
    assert judge.tokenizer.decode(judge.digit_ids) == "123456789"


# scores ----------------------------------------------------------------------------------------------------

def plain_logits(judge: Judge, group: list, written: list[int]) -> torch.Tensor:
    """Logits [n, V] at each place of prompt + written ids, all by transformers; group [LR, candidate]."""
    pixels, grids = mllm.pixel_patches(judge, [group])
    ids = torch.tensor([prompt_ids(judge, grids) + written])
    with torch.no_grad():
        return judge.net(input_ids=ids, attention_mask=torch.ones_like(ids), pixel_values=pixels,
                         image_grid_thw=grids, mm_token_type_ids=(ids == judge.image_id).int()).logits[0]


def test_positions_are_those_of_transformers(judge):
    for height, width in ((32, 32), (32, 80), (64, 32)):
        _, grids = mllm.pixel_patches(judge, [make_images(0, height, width, count=1)])
        rows = token_tree.collate([mllm.prompt_row(judge, grids[0], grids[1:])], judge.device)
        wanted, delta = judge.net.model.get_rope_index(rows.ids, (rows.ids == judge.image_id).int(),
                                                       image_grid_thw=grids)
        assert torch.equal(rows.positions, wanted)
        assert rows.ends[0][1] == rows.ids.shape[1] + int(delta)    # where the reply begins


@pytest.mark.parametrize("view", ["image", "clip"])
def test_expected_scores_are_expectations_over_nine_digits(view):
    judge, _ = build_judge(view)
    lr, *images = make_images(3)
    scores = mllm.expected_scores(judge, [lr], [images])
    digits = torch.arange(1.0, 10.0)
    for c, image in enumerate(images):
        for a, stem in enumerate(judge.stems):
            logits = plain_logits(judge, [lr, image], stem)[-1, judge.digit_ids]
            assert scores[0, c, a] == pytest.approx(float(logits.softmax(-1) @ digits), abs=1e-4)
    assert scores.std() > 1e-3                                  # far over the tolerance: the comparison says something


def test_expected_scores_alone_in_a_batch_and_permuted(judge):
    groups = [make_images(seed, 32, 32 + 16 * (seed % 2)) for seed in range(5)]
    lrs, images = [group[0] for group in groups], [group[1:] for group in groups]
    scores = mllm.expected_scores(judge, lrs, images)
    assert scores.shape == (5, 3, 3) and scores.min() >= 1 and scores.max() <= 9
    for size in (1, 2, 5):
        again = mllm.expected_scores(judge, lrs, images, groups_per_forward=size)
        torch.testing.assert_close(again, scores, rtol=0, atol=1e-5)
    permuted = mllm.expected_scores(judge, lrs[::-1], [[own[i] for i in (2, 0, 1)] for own in images[::-1]])
    torch.testing.assert_close(permuted, scores.flip(0)[:, [2, 0, 1]], rtol=0, atol=1e-5)
    single = mllm.expected_scores(judge, lrs, [own[1:2] for own in images])
    torch.testing.assert_close(single, scores[:, 1:2], rtol=0, atol=1e-5)
    other_lr = mllm.expected_scores(judge, lrs[1:2], images[:1])
    assert not torch.allclose(other_lr, scores[:1], atol=1e-3)


# replies ---------------------------------------------------------------------------------------------------

def slow_reply(judge: Judge, group: list, uniforms: list[float]) -> tuple[list[int], list[float]]:
    """One reply without cache or batch: the whole row for every token, then a walk along the chances."""
    ids, logps = [], []
    for u in uniforms:
        chances, passed = writer_logp(judge, group, ids).exp().tolist(), 0.0
        for token, chance in enumerate(chances):
            passed += chance
            if chance > 0 and u < passed:
                break
        ids.append(token)
        logps.append(math.log(chances[token]))
        if token == judge.end_id:
            break
    return ids, logps


def writer_logp(judge: Judge, group: list, ids: list[int]) -> torch.Tensor:
    """Log-probabilities [V] of the next token, image tokens excluded."""
    logits = plain_logits(judge, group, ids)[-1].double()
    return logits.index_fill(0, judge.banned_ids, -math.inf).log_softmax(-1)


@pytest.fixture(scope="module")
def written(judge) -> tuple:
    """
    Two cohorts of two candidates, of unlike sizes; uniforms [4, 2, 8]; and what the slow loop makes of them.

    The first reply is made to end early, by the right uniform.
    """
    cohorts = [make_images(0, 32, 32, count=2), make_images(1, 32, 64, count=2)]
    prompts = [[lr, image] for lr, *images in cohorts for image in images]
    uniforms = torch.rand(4, 2, 8, generator=torch.Generator().manual_seed(5))
    begun, _ = slow_reply(judge, prompts[0], uniforms[0, 0, :3].tolist())
    chances = writer_logp(judge, prompts[0], begun).exp()
    uniforms[0, 0, 3] = chances[:judge.end_id].sum() + chances[judge.end_id] / 2
    slow = [[slow_reply(judge, group, row) for row in own] for group, own in zip(prompts, uniforms.tolist())]
    return cohorts, prompts, uniforms, slow


def features_of(judge: Judge, groups: list[list]) -> tuple[list, torch.Tensor]:
    with torch.no_grad():
        return mllm.image_features(judge, groups)


def test_sampled_replies_equal_a_slow_loop_without_cache(judge, written):
    _, prompts, uniforms, slow = written
    replies = sample_replies(judge, *features_of(judge, prompts), uniforms)
    assert replies == [[ids for ids, _ in own] for own in slow]
    assert len(replies[0][0]) == 4 and replies[0][0][-1] == judge.end_id and len(replies[1][1]) == 8


def test_a_reply_depends_on_its_own_uniforms_alone(judge, written):
    _, prompts, uniforms, slow = written
    for n, group in enumerate(prompts):
        features = features_of(judge, [group])
        for k in range(2):
            alone = sample_replies(judge, *features, uniforms[n:n + 1, k:k + 1])
            assert alone == [[slow[n][k][0]]]
        many = sample_replies(judge, *features, uniforms[n:n + 1, [1, 0, 1, 1]])
        assert many == [[slow[n][k][0] for k in (1, 0, 1, 1)]]


def test_log_probabilities_in_training_are_those_of_the_writer(judge, written):
    cohorts, prompts, _, slow = written
    replies = [[[ids for ids, _ in own] for own in slow[i:i + 2]] for i in (0, 2)]      # cohorts x C x K
    digits = torch.randint(len(judge.tokenizer), (4 * 3, 5), generator=torch.Generator().manual_seed(0))
    digits[torch.isin(digits, judge.banned_ids)] = judge.end_id
    with torch.no_grad():
        features = features_of(judge, cohorts)
        logp, mask, digit_logp = answer_logp(judge, *features, replies, digits)
    assert mask.sum(1).tolist() == [len(ids) for own in slow for ids, _ in own]
    wanted = torch.tensor([value for own in slow for _, values in own for value in values])
    torch.testing.assert_close(logp[mask], wanted, rtol=0, atol=1e-4)
    for n, group in enumerate(prompts):
        for a, stem in enumerate(judge.stems):
            wanted = writer_logp(judge, group, stem).float()[digits[3 * n + a]]
            torch.testing.assert_close(digit_logp[3 * n + a], wanted, rtol=0, atol=1e-4)


def test_image_tokens_are_never_written(judge):
    names = [f"<|{name}|>" for name in ("vision_start", "vision_end", "image_pad", "video_pad", "vision_pad")]
    assert sorted(judge.banned_ids.tolist()) == sorted(judge.tokenizer.convert_tokens_to_ids(names))
    logits = mllm.policy_logits(judge, 100 * torch.randn(50, 32, generator=torch.Generator().manual_seed(0)))
    assert logits[:, judge.banned_ids].isneginf().all() and logits.dtype == torch.float32
    ends = torch.tensor([0.0, 1 - 2**-24]).expand(50, 2)            # the least and the greatest of torch.rand
    assert not torch.isin(draw(logits, ends), judge.banned_ids).any()
    first_and_last = torch.full((1, 9), -torch.inf).index_fill(1, torch.tensor([3, 5]), 0.0)
    assert draw(first_and_last, ends[:1]).tolist() == [[3, 5]]
    uniforms = torch.rand(1, 20000, generator=torch.Generator().manual_seed(1))
    drawn = draw(torch.tensor([[0.1, 0.2, 0.7]]).log(), uniforms)[0]
    shares = torch.bincount(drawn, minlength=3) / 20000
    torch.testing.assert_close(shares, torch.tensor([0.1, 0.2, 0.7]), rtol=0, atol=0.01)


# on disk ---------------------------------------------------------------------------------------------------

def test_a_saved_judge_gives_the_same_scores_wherever_its_folder_lies(judge, tmp_path):
    lr, *images = make_images(4)
    mllm.save_judge(judge, tmp_path / "run" / "judge", base="unused")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    loaded = mllm.load_judge(tmp_path / "moved", torch.device("cpu"))
    own, wanted = (mllm.expected_scores(each, [lr], [images]) for each in (loaded, judge))
    assert torch.equal(own, wanted)
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training


def test_a_judge_that_does_not_fit_is_refused_in_one_line(judge, tmp_path, capsys):
    mllm.save_judge(judge, tmp_path / "judge", base="unused")
    capsys.readouterr()                                         # transformers' progress bar
    facts = json.loads((tmp_path / "judge" / "judge.json").read_text())
    run.write_json(tmp_path / "judge" / "judge.json", facts | {"prompt_version": 0})
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path, torch.device("cpu"))
    message = capsys.readouterr().err
    assert "prompt version 0" in message and message.count("\n") == 1
    run.write_json(tmp_path / "judge" / "judge.json", facts)
    (tmp_path / "judge" / "model" / "config.json").unlink()
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path, torch.device("cpu"))
    message = capsys.readouterr().err
    assert str(tmp_path / "judge" / "model") in message and message.count("\n") == 1


def test_a_model_folder_is_a_judge_without_training(judge, tmp_path, capsys):
    mllm.save_model(judge, tmp_path / "model")
    loaded = mllm.load_judge(tmp_path / "model", torch.device("cpu"))
    lr, *images = make_images(0)
    assert (loaded.lr_view, loaded.candidate_view, loaded.net.dtype) == ("resized", "image", torch.float32)
    assert loaded.processor.size["longest_edge"] == mllm.UNTRAINED_MAX_PIXELS
    assert torch.equal(mllm.expected_scores(loaded, [lr], [images]), mllm.expected_scores(judge, [lr], [images]))
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path / "nothing", torch.device("cpu"))
    assert "give the folder of a finished stage 02, or a folder or hub id" in capsys.readouterr().err
