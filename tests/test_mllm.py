"""
The judge as a reader: strict parser, prompt, scores that belong to their (LR, candidate) alone, loading.

Run     python -m pytest tests/test_mllm.py         # 15 s
"""
import itertools
import json
import shutil

import numpy as np
import pytest
import torch

from common import mllm, run, token_tree
from common.images import resize
from common.metrics import AXES
from common.mllm import Judge
from conftest import build_judge, make_images

CPU = torch.device("cpu")
GOOD = "<thinking>close; fair</thinking><answer>consistency: 7, naturalness: 4, overall: 5</answer>"
ANSWER = GOOD[GOOD.index("<answer>"):]
REFUSED = {
    "empty": "", "prose": "I would give this image 7 out of 9 for consistency.",
    "no thinking": ANSWER, "no answer": "<thinking>close; fair</thinking>", "cut short": GOOD[:-4],
    "thinking not closed": GOOD.replace("</thinking>", ""), "text before": "Sure! " + GOOD,
    "newline after": GOOD + "\n",
    "end token left in": GOOD + "<|im_end|>", "two replies": GOOD * 2, "two answers": GOOD + ANSWER,
    "an answer inside the thinking": GOOD.replace("close", ANSWER),
    "thinking inside thinking": GOOD.replace("close", "<thinking>close"),
    "score 0": GOOD.replace("7", "0"), "score 10": GOOD.replace("7", "10"), "score -7": GOOD.replace("7", "-7"),
    "score 7.5": GOOD.replace("7", "7.5"), "a word as score": GOOD.replace("7", "seven"),
    "full-width digit": GOOD.replace("7", "\uff17"), "axis missing": GOOD.replace(", overall: 5", ""),
    "axis twice": GOOD.replace("overall", "consistency"), "capitals": GOOD.replace("consistency", "Consistency"),
    "axes in another order": GOOD.replace("consistency: 7, naturalness: 4", "naturalness: 4, consistency: 7"),
    "other spaces": GOOD.replace(": 7", ":  7"), "100 kB of open tags": "<thinking>" * 10_000,
    "100 kB of text, then nothing": "<thinking>" + "a" * 100_000, "100 kB of answers": ANSWER * 1_500}


@pytest.fixture(scope="module")
def judge() -> Judge:
    return build_judge()[0]


@pytest.mark.parametrize("name", REFUSED)
def test_a_reply_in_any_other_form_has_no_score(name):
    assert mllm.parse_reply(REFUSED[name]) is None              # with backtracking 100 kB would take hours


def test_replies_in_the_asked_form():
    for thought in ("close; fair", "", "two\nlines", "a < b > c & </b>", "7, 8, 9", "\u4f60\u597d", "x" * 100_000):
        scores = mllm.parse_reply(GOOD.replace("close; fair", thought))
        assert scores == {"consistency": 7, "naturalness": 4, "overall": 5}


def test_composed_replies_parse_to_their_targets(judge):
    methods = ("hr", "", "warp+blur", *mllm.FAULTS)
    for i, targets in enumerate(itertools.product((1, 1.49, 4.8, 5, 9, 9.4), repeat=3)):
        reply = mllm.compose_reply(np.array(targets), methods[i % len(methods)])
        ids = judge.encode(reply)
        assert ids[-1] == judge.end_id and judge.end_id not in ids[:-1]
        assert mllm.reply_text(judge, ids) + "<|im_end|>" == reply
        wanted = dict(zip(AXES, (min(round(target), 9) for target in targets)))
        assert mllm.parse_reply(mllm.reply_text(judge, ids)) == wanted
        assert mllm.parse_reply(mllm.reply_text(judge, ids[:-3])) is None
    unknown = mllm.compose_reply(np.array([np.nan, 3.0, np.nan]), "hr").removesuffix("<|im_end|>")
    assert mllm.parse_reply(unknown) == dict.fromkeys(AXES, 3)  # unknown axes repeat what is known


def test_a_model_that_can_reason_is_taught_the_form_and_the_digits_and_no_reason(judge):
    ids, taught = mllm.form_of_reply(judge, np.array([7, 4, np.nan]))
    text = judge.tokenizer.decode(ids).removesuffix("<|im_end|>")
    assert mllm.parse_reply(text) == {"consistency": 7, "naturalness": 4, "overall": 6} and len(taught) == len(ids)
    kept, left_out = (judge.tokenizer.decode([token for token, one in zip(ids, taught) if one == which])
                      for which in (True, False))
    assert left_out == "why</" and kept == text.replace("why</", "") + "<|im_end|>"


def test_a_changed_prompt_changes_the_version(judge):
    assert mllm.PROMPT_VERSION == 1 and judge.tokenizer.decode(judge.digit_ids) == "123456789"
    text = ("Image 1 is the low-resolution input, image 2 a super-resolved candidate. Score each from 1 to 9: "
            "consistency of image 2 with image 1, naturalness of image 2, overall. "
            "Reply <thinking>why</thinking><answer>consistency: d, naturalness: d, overall: d</answer>")
    assert [judge.tokenizer.decode(stem) for stem in judge.stems] == [f"<answer>{axis}: " for axis in AXES]
    grids = torch.tensor([[1, 4, 6], [1, 4, 4]])
    ids = [token for segment in mllm.prompt_row(judge, grids[0], grids[1:]) for token in segment.ids]
    lr, candidate = "<|image_pad|>" * 6, "<|image_pad|>" * 4
    assert ids == judge.encode(f"<|im_start|>user\n{text}\n<|vision_start|>{lr}<|vision_end|>\n<|vision_start|>"
                               f"{candidate}<|vision_end|><|im_end|>\n<|im_start|>assistant\n")


def test_a_clip_holds_the_lr_image_in_its_first_frame_and_the_candidate_in_its_second():
    judge, _ = build_judge("clip")
    lr, *images = make_images(0)
    shown = [resize(lr, (32, 32), "bicubic"), *images]
    still = judge.processor(shown, return_tensors="pt")["pixel_values"].view(4, 16, 3, 2, 64)    # [.., frame, px]
    clip = mllm.pixel_patches(judge, [[lr, *images]])[0].view(4, 16, 3, 2, 64)
    assert torch.allclose(clip[..., 1, :], still[..., 1, :], atol=1e-6)
    assert torch.allclose(clip[..., 0, :], still[:1, ..., 0, :].expand(4, -1, -1, -1), atol=1e-6)


# a score belongs to its (LR, candidate) alone --------------------------------------------------------------------

SIZES = ((32, 32), (32, 64), (64, 32), (48, 48), (32, 48), (64, 64))


def score(judge: Judge, groups: list[list], size: int = 16) -> torch.Tensor:
    return mllm.expected_scores(judge, [g[0] for g in groups], [g[1:] for g in groups], groups_per_forward=size)


@pytest.mark.parametrize("view, dtype, tolerance", [
    ("image", torch.float32, 1e-5), ("clip", torch.float32, 1e-5), ("clip", torch.bfloat16, 0.05)])
def test_a_score_alone_is_its_score_in_any_batch_order_and_padding(view, dtype, tolerance):
    """Of a score in 1..9. bfloat16: measured 0.0004 here, 0.023 with the demo's judge."""
    judge, _ = build_judge(view)
    judge.model.to(dtype)
    groups = [make_images(seed, *size) for seed, size in enumerate(SIZES)]
    whole, order, turn = score(judge, groups), [3, 0, 5, 1, 4, 2], [2, 0, 1]
    assert whole.shape == (6, 3, 3) and whole.min() >= 1 and whole.max() <= 9 and whole.std() > 1e-3
    alone = torch.cat([score(judge, [[lr, image]]).view(1, 1, 3) for lr, *images in groups for image in images])
    shuffled = score(judge, [[groups[g][0], *(groups[g][1 + c] for c in turn)] for g in order], size=4)
    padded = torch.cat([score(judge, [group, make_images(9, 128, 128)])[:1] for group in groups])
    for scores in (alone.view_as(whole), shuffled[np.argsort(order)][:, np.argsort(turn)], padded):
        torch.testing.assert_close(scores, whole, rtol=0, atol=tolerance)
    uneven = mllm.expected_scores(judge, [g[0] for g in groups], [g[1:2 + i % 3] for i, g in enumerate(groups)])
    assert uneven.isnan().any(-1).sum(1).tolist() == [2, 1, 0] * 2
    torch.testing.assert_close(torch.where(uneven.isnan(), whole, uneven), whole, rtol=0, atol=tolerance)
    other_lr = mllm.expected_scores(judge, [groups[1][0]], [groups[0][1:]])
    assert not torch.allclose(other_lr, whole[:1], atol=1e-3)


def test_expected_scores_in_a_reply_are_those_of_a_row_that_holds_it(judge):
    group, texts = make_images(3), ["<thinking>close; 4 fair</thinking>", None, "<thinking></thinking>"]
    with torch.no_grad():
        features, grids = mllm.image_features(judge, [group])
        replies = [text and judge.encode(text + mllm.compose_answer(np.array([5, 3, 7]))) for text in texts]
        scores = mllm.expected_in_reply(judge, features, grids, replies)
    assert scores[1].isnan().all() and mllm.expected_in_reply(judge, features, grids, [None] * 3).isnan().all()
    for c in (0, 2):
        for a, digit in enumerate("537"):
            alone = [features[0], features[1 + c]]
            row = mllm.prompt_row(judge, grids[0], grids[1 + c:2 + c])
            place = max(p for p, token in enumerate(replies[c]) if [token] == judge.encode(digit))
            row.append(token_tree.text_segment(replies[c][:place], 1))
            with torch.no_grad():
                hidden = mllm.hidden_states(judge, token_tree.collate([row], CPU), alone)[0, -1]
                chances = mllm.policy_logits(judge, hidden)[judge.digit_ids].softmax(-1)
            assert float(scores[c, a]) == pytest.approx(float(chances @ torch.arange(1.0, 10.0)), abs=1e-4)
    assert not torch.allclose(scores[0], score(judge, [group])[0, 0], atol=1e-4)        # a thought matters


# on disk -----------------------------------------------------------------------------------------------------

def test_a_saved_judge_gives_the_same_scores_wherever_its_folder_lies(judge, tmp_path):
    mllm.save_judge(judge, tmp_path / "run" / "judge", base="unused")
    shutil.move(tmp_path / "run", tmp_path / "moved")
    loaded = mllm.load_judge(tmp_path / "moved", CPU)
    assert torch.equal(score(loaded, [make_images(4)]), score(judge, [make_images(4)]))
    assert not any(p.requires_grad for p in loaded.model.parameters()) and not loaded.model.training


def test_a_model_folder_is_a_judge_without_training(judge, tmp_path, capsys):
    mllm.save_model(judge, tmp_path / "model")
    loaded = mllm.load_judge(tmp_path / "model", CPU)
    assert (loaded.lr_view, loaded.candidate_view, loaded.net.dtype) == ("resized", "image", torch.float32)
    assert loaded.processor.size["longest_edge"] == mllm.UNTRAINED_MAX_PIXELS
    assert torch.equal(score(loaded, [make_images(0)]), score(judge, [make_images(0)]))
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path / "nothing", CPU)
    assert "give the folder of a finished stage 02, or a folder or hub id" in capsys.readouterr().err


def test_a_judge_of_another_prompt_is_refused_in_one_line(judge, tmp_path, capsys):
    mllm.save_judge(judge, tmp_path / "judge", base="unused")
    capsys.readouterr()                                         # transformers' progress bar
    facts = json.loads((tmp_path / "judge" / "judge.json").read_text())
    run.write_json(tmp_path / "judge" / "judge.json", facts | {"prompt_version": 0})
    with pytest.raises(SystemExit):
        mllm.load_judge(tmp_path, CPU)
    message = capsys.readouterr().err
    assert "prompt version 0" in message and message.count("\n") == 1
