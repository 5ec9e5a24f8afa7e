"""
`label: mllm`: both orders are asked, only consistent answers count, position bias is reported; ranks as from votes.

Run     python -m pytest tests/test_mllm_labels.py      # 20 s on one core
"""
import json
import shutil

import numpy as np
import pytest
import torch
import transformers

from common import mllm, mllm_labels
from common.config import load_config
from common.groups import SPLITS, group_images, load_groups
from common.images import resize, write_png
from common.small_mllm import build_tokenizer
from conftest import build_judge, load_stage, make_images
from test_families import save_random

SETTINGS = {"hr_dir": "skimage", "hr_size": 32, "train_groups": 2, "val_groups": 1, "test_groups": 1,
            "val_sources": ["rocket"], "test_sources": ["coffee"], "degradation": "mild", "workers": 1,
            "candidates": ["hr", "resample", "inconsistent"]}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small random Qwen2.5-VL on disk."""
    folder = tmp_path_factory.mktemp("model")
    mllm.save_model(build_judge()[0], folder)
    return folder


def build(tmp_path, **settings):
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"run": str(tmp_path / "run"), "seed": 0, "01_build_dataset": SETTINGS | settings}))
    module = load_stage("01")
    module.main(load_config(module.Config, module.__file__, [str(config)]))
    return tmp_path / "run" / "01_build_dataset"


def test_answers_do_not_depend_on_the_batch_and_see_the_images(model):
    asker = mllm_labels.load(str(model), torch.device("cpu"))
    lr, *images = make_images(1, count=4)
    lr = np.repeat(np.repeat(lr, 4, 0), 4, 1)
    triples = [[lr, images[i], images[j]] for i in range(4) for j in range(4) if i != j]
    first = mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 1)
    assert first.shape == (12,) and np.array_equal(
        first, mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 5))
    inputs = mllm_labels.qwen_inputs(asker, triples[:2], "Which?")
    logits = asker.model(**inputs).logits[:, -1]
    assert not torch.equal(logits[0], logits[1]), "other images, other logits"
    assert int(inputs["mm_token_type_ids"].sum()) * 4 == len(inputs["pixel_values"])


def test_a_tie_is_no_answer(model, toy_group):
    asker, (folder, group) = mllm_labels.load(str(model), torch.device("cpu")), toy_group
    with torch.no_grad():
        head = asker.model.lm_head.weight
        head[asker.letters[0]] = head[asker.letters[1]]
    lr, *images = make_images(1)
    said = mllm_labels.both_orders(asker, resize(lr, (32, 32), "bicubic"), images, 4)
    assert said.shape == (3, 3, 2) and (said == 0.5).all()
    for found in mllm_labels.ask_group(asker, folder, group, 4).values():
        assert found["votes"] == [] and found["first"] == found["asked"] / 2


@pytest.fixture
def toy_group(tmp_path) -> tuple:
    """(folder, group) of one LR image with three candidates."""
    paths = ["lr.png", "0.png", "1.png", "2.png"]
    for path, image in zip(paths, make_images(1), strict=True):
        write_png(tmp_path / path, image)
    return tmp_path, {"lr": paths[0], "hr": None, "candidates": [{"path": path} for path in paths[1:]]}


def test_only_consistent_answers_become_votes(monkeypatch, tmp_path):
    """A model that likes bright images on one axis, always says A on another, and B on the third."""
    def fake(asker, triples, question, batch):
        if question == mllm_labels.QUESTIONS["consistency"]:
            return np.array([a.mean() > b.mean() for _, a, b in triples])
        return np.full(len(triples), question == mllm_labels.QUESTIONS["naturalness"])
    monkeypatch.setattr(mllm_labels, "answers", fake)
    monkeypatch.setattr(mllm_labels, "find", lambda source: None)
    monkeypatch.setattr(mllm_labels, "load", lambda source, device: None)
    folder = build(tmp_path, label="mllm", label_model="fake", lr_dir=None)
    for split in SPLITS:
        for group in load_groups(folder, split):
            assert set(group["labels"]) == {"consistency"}
            label = group["labels"]["consistency"]
            light = [image.mean() for image in group_images(folder, group)[1]]
            assert label["source"] == "mllm" and np.array_equal(np.argsort(label["ranks"]), np.argsort(light)[::-1])
            assert len(label["votes"]) == 3 and label["votes"][0]["annotator"] == "fake"
    found = json.loads((folder / "quality.json").read_text())
    assert found["label_model"] == {"model": "fake", "questions": 4 * 3 * 6, "consistent": round(1 / 3, 4),
                                    "first_place": 0.5, "unlabeled": 8}
    assert any("the label model names the first place in 50%" in line for line in found["warnings"])
    assert json.loads((folder / "manifest.json").read_text())["results"]["label_source"] == "mllm"


def test_a_real_model_labels_and_says_how_biased_it_is(model, tmp_path, capsys):
    folder = build(tmp_path, label="mllm", label_model=str(model), label_batch=4)
    found = json.loads((folder / "quality.json").read_text())["label_model"]
    assert found["questions"] == 72 and 0 <= found["consistent"] <= 1 and 0 <= found["first_place"] <= 1
    assert "of the answers for the first place" in capsys.readouterr().out
    assert not (folder / "progress").exists()


@pytest.fixture(scope="module")
def llava(tmp_path_factory):
    """A small random LLaVA on disk: another family, fed by its own processor and chat template."""
    folder = tmp_path_factory.mktemp("llava")
    tokenizer = build_judge()[0].tokenizer
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    text = transformers.LlamaConfig(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
                                    vocab_size=len(tokenizer), initializer_range=0.5)
    vision = transformers.CLIPVisionConfig(hidden_size=16, intermediate_size=16, num_hidden_layers=2,
                                           num_attention_heads=2, image_size=32, patch_size=8)
    config = transformers.LlavaConfig(vision_config=vision, text_config=text,
                                      image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder)
    side = {"height": 32, "width": 32}
    template = ("{% for message in messages %}USER: {% for part in message['content'] %}"
                "{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}{% endfor %} ASSISTANT:")
    images = transformers.CLIPImageProcessorPil(size=side, crop_size=side)
    transformers.LlavaProcessor(images, tokenizer, patch_size=8, vision_feature_select_strategy="default",
                                num_additional_image_tokens=1, chat_template=template).save_pretrained(folder)
    return folder


def test_a_qwen3_vl_is_fed_the_tokens_that_its_own_vision_tower_makes(tmp_path):
    save_random(tmp_path, "qwen3_vl", build_tokenizer())
    asker = mllm_labels.load(str(tmp_path), torch.device("cpu"))
    lr, *images = make_images(1, 64, 64, count=3)
    triples = [[resize(lr, (64, 64), "bicubic"), images[i], images[j]] for i, j in ((0, 1), (1, 2), (2, 0))]
    first = mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 1)
    assert np.array_equal(first, mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 3))


def test_a_model_of_another_family_sees_the_images_and_labels(llava, tmp_path):
    asker = mllm_labels.load(str(llava), torch.device("cpu"))
    lr, *images = make_images(1, count=4)
    lr = np.repeat(np.repeat(lr, 4, 0), 4, 1)
    triples = [[lr, images[i], images[j]] for i in range(4) for j in range(4) if i != j]
    inputs = mllm_labels.chat_inputs(asker, triples[:2], "Which?")
    assert (inputs["input_ids"] == asker.model.config.image_token_id).sum(1).tolist() == [3 * 16] * 2
    assert asker.tokenizer.decode(inputs["input_ids"][0]).endswith("Which? ASSISTANT:")
    logits = asker.model(**inputs).logits[:, -1]
    assert not torch.equal(logits[0], logits[1]), "other images, other logits"
    first = mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 1)
    assert np.array_equal(first, mllm_labels.answers(asker, triples, mllm_labels.QUESTIONS["overall"], 5))
    folder = build(tmp_path, label="mllm", label_model=str(llava))
    found = json.loads((folder / "quality.json").read_text())["label_model"]
    assert found["questions"] == 72 and 0 <= found["consistent"] <= 1


def test_a_model_without_a_chat_template_is_refused(llava, tmp_path, capsys):
    shutil.copytree(llava, tmp_path / "model")
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(SystemExit):
        mllm_labels.find(str(tmp_path / "model"))
    assert "has no chat template; choose a model that was trained to answer" in capsys.readouterr().err


@pytest.mark.parametrize("settings, words", [
    ({"label": "mllm"}, "label: mllm and label_model belong together"),
    ({"label_model": "x"}, "label: mllm and label_model belong together"),
    ({"label": "people"}, "label should be proxy or mllm, got 'people'"),
    ({"label": "mllm", "label_model": "m", "hr_dir": None, "import_from": "x"}, "does not go with import_from"),
    ({"label": "mllm", "label_model": "/nowhere/at/all"}, "label_model: /nowhere/at/all cannot be loaded"),
])
def test_wrong_settings(tmp_path, capsys, settings, words):
    with pytest.raises(SystemExit):
        build(tmp_path, **settings)
    assert words in capsys.readouterr().err
    assert not (tmp_path / "run").exists(), "found out before any work"
