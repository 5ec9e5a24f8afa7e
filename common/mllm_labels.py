"""
`label: mllm`: a multimodal LLM says which of two candidates is better; both orders are asked, and only answers that
stay the same count. From these votes ranks come by the rule of common/votes.py, as from imported ones.

The answer is the likelier of the tokens "A" and "B" right behind the question: deterministic, and never unparsable.
"""
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer,
                          Qwen2VLImageProcessorPil)

from common import dist, run, votes
from common.config import fail
from common.groups import group_images
from common.images import resize
from common.metrics import AXES
from common.run import read_json
from common.tables import read_json_lines

QUESTIONS = dict(zip(AXES, (
    "Which of A and B shows more exactly what image 1 shows, with the same shapes and colors and nothing invented?",
    "Which of A and B looks more like a sharp, clean photograph, without blur, noise, ringing or other faults?",
    "Which of A and B is the better version of image 1: true to it, and natural?")))
PROMPT = ("Image 1 is a low-resolution photograph, enlarged. Image 2 (A) and image 3 (B) are super-resolved versions "
          "of it. {question} Answer with one letter, A or B.")
QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")   # read without torchvision, which their own processor asks for


@dataclass
class Asker:
    model: torch.nn.Module              # any AutoModelForImageTextToText
    tokenizer: object
    images: object                      # a Qwen-VL's image processor, or the whole processor of another model
    letters: torch.Tensor               # int64 [2] the tokens A and B


def find(source: str, key: str = "label_model") -> tuple[object, object]:
    """(tokenizer, images) of a transformers folder or hub id, as in Asker, without its weights. key: for errors."""
    try:
        kind = AutoConfig.from_pretrained(source).model_type
        images = (Qwen2VLImageProcessorPil if kind in QWEN else AutoProcessor).from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source) if kind in QWEN else images.tokenizer
    except (OSError, ValueError, ImportError, AttributeError) as error:
        fail(f"{key}: {source} cannot be loaded ({error}); give a folder or hub id of an image-text-to-text "
                 "model")
    tokenizer.padding_side = "left"
    if kind not in QWEN and not images.chat_template:
        fail(f"{key}: {source} has no chat template; choose a model that was trained to answer")
    if [len(tokenizer.encode(letter, add_special_tokens=False)) for letter in "AB"] != [1, 1]:
        fail(f"{key}: {source}: A and B are not one token each; choose another model")
    return tokenizer, images


def load(source: str, device: torch.device, key: str = "label_model") -> Asker:
    """The label model of a transformers folder or hub id."""
    tokenizer, images = find(source, key)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    try:
        model = AutoModelForImageTextToText.from_pretrained(source, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError, ImportError) as error:
        fail(f"{key}: {source} cannot be loaded ({error}); give one with safetensors weights")
    letters = torch.tensor([tokenizer.encode(letter, add_special_tokens=False) for letter in "AB"], device=device)[:, 0]
    return Asker(model.to(device).eval(), tokenizer, images, letters)


def qwen_inputs(asker: Asker, triples: list[list[np.ndarray]], text: str) -> dict[str, torch.Tensor]:
    """What a Qwen-VL is fed; all images have one size, so all rows one length."""
    made = asker.images([image for triple in triples for image in triple], return_tensors="pt")
    tokens = int(made["image_grid_thw"][0].prod()) // asker.images.merge_size**2
    picture = f"<|vision_start|>{'<|image_pad|>' * tokens}<|vision_end|>"
    chat = f"<|im_start|>user\n{picture * 3}{text}<|im_end|>\n<|im_start|>assistant\n"
    ids = torch.tensor([asker.tokenizer.encode(chat, add_special_tokens=False)] * len(triples))
    is_image = (ids == asker.tokenizer.convert_tokens_to_ids("<|image_pad|>")).int()
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "mm_token_type_ids": is_image, **made}


def chat_inputs(asker: Asker, triples: list[list[np.ndarray]], text: str) -> dict[str, torch.Tensor]:
    """What another model is fed, by its own processor and chat template."""
    content = [{"type": "image"}] * 3 + [{"type": "text", "text": text}]
    chat = asker.images.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    return dict(asker.images(text=[chat] * len(triples), images=triples, padding=True, return_tensors="pt"))


@torch.no_grad()
def answers(asker: Asker, triples: list[list[np.ndarray]], question: str, batch: int) -> np.ndarray:
    """float [n] the answers to [LR, A, B]: 1 A, 0 B, 0.5 if equally likely; images uint8 [H, W, 3] of one size."""
    prepare = qwen_inputs if asker.model.config.model_type in QWEN else chat_inputs
    first = []
    for start in range(0, len(triples), batch):
        inputs = prepare(asker, triples[start:start + batch], PROMPT.format(question=question))
        inputs = {key: value.to(asker.model.device) for key, value in inputs.items()}
        inputs["pixel_values"] = inputs["pixel_values"].to(asker.model.dtype)
        made = asker.model.generate(**inputs, max_new_tokens=1, do_sample=False, output_logits=True,
                                    return_dict_in_generate=True)
        scores = made.logits[0][:, asker.letters].float()                                   # [n, 2]
        first.append((1 + (scores[:, 0] - scores[:, 1]).sign().cpu().numpy()) / 2)            # bfloat16 often ties
    return np.concatenate(first)


def both_orders(asker: Asker, lr: np.ndarray, images: list[np.ndarray], batch: int) -> np.ndarray:
    """float [3 axes, pairs, 2]: the answer, see answers, for each pair (i, j), i < j, as A and B, and as B and A."""
    lr = resize(lr, images[0].shape[1::-1], "bicubic")
    pairs = combinations(range(len(images)), 2)
    triples = [[lr, images[i], images[j]] for a, b in pairs for i, j in ((a, b), (b, a))]
    return np.stack([answers(asker, triples, QUESTIONS[axis], batch).reshape(-1, 2) for axis in AXES])


def ask_group(asker: Asker, folder: Path, group: dict, batch: int) -> dict[str, dict]:
    """{axis: {votes, first: answers A, asked}} of one group; a vote is kept only if both orders name one candidate."""
    lr, images, _ = group_images(folder, group)
    pairs, found = list(combinations(range(len(images)), 2)), {}
    for axis, said in zip(AXES, both_orders(asker, lr, images, batch)):                     # [pairs, orders]
        kept = [{"a": a, "b": b, "choice": "a" if straight else "b"}
                for (a, b), (straight, swapped) in zip(pairs, said.tolist()) if abs(straight - swapped) == 1]
        found[axis] = {"votes": kept, "first": float(said.sum()), "asked": said.size}
    return found


def ask_all(cfg, folder: Path, device: torch.device) -> None:
    """Ask about this rank's share of the groups; a file per group in progress/answers, what is there is kept."""
    out = folder / "progress" / "answers"
    out.mkdir(exist_ok=True)
    groups = [group for _, group in read_json_lines(folder / "groups.jsonl")][dist.rank()::dist.world_size()]
    left = [group for group in groups if not (out / f"{group['id']}.json").exists()]
    asker = load(cfg.label_model, device) if left else None
    for group in tqdm(left, desc="ask", mininterval=1, disable=not dist.is_main()):
        run.write_json(out / f"{group['id']}.json", ask_group(asker, folder, group, cfg.label_batch))


def collect(cfg, folder: Path, groups: list[dict]) -> dict:
    """Give the groups their labels; {model, questions, consistent, first_place, unlabeled} over all answers."""
    asked = first = kept = unlabeled = 0
    for group in groups:
        for axis, found in read_json(folder / "progress" / "answers" / f"{group['id']}.json").items():
            asked, first, kept = asked + found["asked"], first + found["first"], kept + len(found["votes"])
            own = [vote | {"annotator": cfg.label_model} for vote in found["votes"]]
            label = votes.label(len(group["candidates"]), own, cfg.tie_margin, source="mllm")
            unlabeled += label is None
            group["labels"] |= {axis: label} if label else {}
    return {"model": cfg.label_model, "questions": asked, "consistent": round(2 * kept / asked, 4),
            "first_place": round(first / asked, 4), "unlabeled": unlabeled}
