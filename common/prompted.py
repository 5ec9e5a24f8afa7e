"""
Any image-text-to-text model of transformers as the judge, untrained: asked by a prompt of yours, read by a pattern.

`judge=` of 03, 04 and 05 then names a YAML file such as configs/judge.yaml, with four keys:

    model        hub id or folder; safetensors
    prompt       what the model is asked; {lr} and {sr}, once each, stand where it sees the two images
    pattern      regular expression of its answer: the groups (?P<consistency>..), (?P<naturalness>..), (?P<overall>..),
                 or some of them, hold numbers on any scale, higher is better; the last match in a reply counts
    max_tokens   of a reply

LR is shown bicubic at the candidate's size. Replies are greedy. A reply that does not match has no score, NaN; an axis
without a group gets the mean of the others. Every candidate costs a written reply: a judge of stage 02 needs none.
"""
import logging
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import yaml
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import (AutoConfig, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer, BatchFeature,
                          Qwen2VLImageProcessorPil)

from common.config import StrictLoader, fail
from common.images import resize
from common.metrics import AXES

QWEN = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")       # their AutoProcessor would need torchvision, for videos
logging.getLogger("huggingface_hub").setLevel(logging.ERROR)    # without a network: ten lines of retries
KEYS = {"model": str, "prompt": str, "pattern": str, "max_tokens": int}


@dataclass
class PromptedJudge:
    model: torch.nn.Module
    processor: object                   # image processor of a Qwen-VL, else the model's whole AutoProcessor
    tokenizer: object
    text: str                           # the prompt in the model's chat format, with a token for each image
    lr_first: bool                      # in the prompt
    pattern: re.Pattern
    max_tokens: int
    device: torch.device
    unread: list[str] = field(default_factory=list)     # replies that did not match, of this rank


def load_prompted(path: Path, device: torch.device) -> PromptedJudge:
    """The judge of a YAML file as above, frozen; or one line that says what is wrong with it."""
    given = read_settings(path)
    order = re.findall(r"\{(lr|sr)\}", given["prompt"])
    try:
        pattern = re.compile(given["pattern"], re.DOTALL)
    except re.error as error:
        fail(f"{path}: pattern is no regular expression: {error}")
    if sorted(order) != ["lr", "sr"]:
        fail(f"{path}: prompt should hold {{lr}} and {{sr}} once each, where the images are to stand")
    if not pattern.groupindex or set(pattern.groupindex) - set(AXES):
        fail(f"{path}: pattern should have named groups, of {', '.join(AXES)}, such as (?P<overall>[0-9.]+)")
    source = given["model"]
    try:
        qwen = AutoConfig.from_pretrained(source).model_type in QWEN
        processor = (Qwen2VLImageProcessorPil if qwen else AutoProcessor).from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source) if qwen else processor.tokenizer
        model = AutoModelForImageTextToText.from_pretrained(
            source, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32, use_safetensors=True,
            device_map={"": device})
        parts = [{"type": "image"} if part in ("{lr}", "{sr}") else {"type": "text", "text": part}
                 for part in re.split(r"(\{lr\}|\{sr\})", given["prompt"]) if part]
        text = (tokenizer if qwen else processor).apply_chat_template(
            [{"role": "user", "content": parts}], add_generation_prompt=True, tokenize=False)
    except (OSError, ValueError, KeyError, AttributeError, ImportError, SafetensorError) as error:
        fail(f"{path}: model {source} cannot be loaded ({' '.join(str(error).split())}); give an image-text-to-text "
             "model with a chat template, as safetensors")
    model = model.eval().requires_grad_(False)
    return PromptedJudge(model, processor, tokenizer, text, order[0] == "lr", pattern, given["max_tokens"], device)


def read_settings(path: Path) -> dict:
    """The four keys; stops with one line if one is missing, unknown or of another type."""
    try:
        given = yaml.load(path.read_text(), StrictLoader)
    except (OSError, ValueError, yaml.YAMLError) as error:
        fail(f"{path} cannot be read as YAML: {error}")
    if not isinstance(given, dict) or given.keys() != KEYS.keys() or \
            not all(type(given[key]) is kind for key, kind in KEYS.items()) or given["max_tokens"] < 1:
        fail(f"{path} should have the keys {', '.join(KEYS)}: three texts and a number of at least 1; see "
             "configs/judge.yaml")
    return given


def model_inputs(judge: PromptedJudge, shown: list[list[np.ndarray]]) -> BatchFeature:
    """What `generate` takes for one row per [LR, candidate], uint8, padded on the left."""
    shown = shown if judge.lr_first else [pair[::-1] for pair in shown]
    if not isinstance(judge.processor, Qwen2VLImageProcessorPil):
        return judge.processor(text=[judge.text] * len(shown), images=shown, return_tensors="pt", padding=True,
                               padding_side="left", add_special_tokens=False)
    batch, mark = judge.processor([image for pair in shown for image in pair], return_tensors="pt"), "<|image_pad|>"
    counts = iter((batch["image_grid_thw"].prod(1) // judge.processor.merge_size**2).tolist())
    texts = [re.sub(re.escape(mark), lambda _: mark * next(counts), judge.text) for _ in shown]
    batch |= judge.tokenizer(texts, return_tensors="pt", padding=True, padding_side="left", add_special_tokens=False)
    is_image = batch["input_ids"] == judge.tokenizer.convert_tokens_to_ids(mark)
    return BatchFeature({**batch, "mm_token_type_ids": is_image.int()})


@torch.no_grad()
def write_replies(judge: PromptedJudge, shown: list[list[np.ndarray]]) -> list[str]:
    """The greedy reply to each [LR, candidate]."""
    inputs = model_inputs(judge, shown).to(judge.device, judge.model.dtype)
    written = judge.model.generate(**inputs, max_new_tokens=judge.max_tokens, do_sample=False, num_beams=1,
                                   temperature=None, top_p=None, top_k=None)
    return judge.tokenizer.batch_decode(written[:, inputs["input_ids"].shape[1]:], skip_special_tokens=True)


def read_reply(judge: PromptedJudge, text: str) -> list[float]:
    """Scores of the three axes, as in AXES; NaN if the reply does not match or a group is no finite number."""
    matches = list(judge.pattern.finditer(text))
    try:
        found = {axis: float(value) for axis, value in matches[-1].groupdict().items()} if matches else {}
    except (ValueError, TypeError):
        found = {}
    if not found or not np.isfinite(list(found.values())).all():
        if not judge.unread:
            tqdm.write(f"warning: the first reply that the judge's pattern does not fit: {text!r}", file=sys.stderr)
        judge.unread.append(text)
        return [np.nan] * len(AXES)
    mean = sum(found.values()) / len(found)
    return [found.get(axis, mean) for axis in AXES]


def written_scores(judge: PromptedJudge, lrs: list[np.ndarray], candidates: list[list[np.ndarray]], *,
                   pairs_per_forward: int) -> Tensor:
    """
    Scores float32 [G, C, 3] on the CPU of the candidates of G LR images, as the model writes them.

    NaN: a reply that does not match, or no such candidate. pairs_per_forward: memory only, up to rounding.
    """
    pairs = [[resize(lr, image.shape[1::-1], "bicubic"), image] for lr, images in zip(lrs, candidates)
             for image in images]
    texts = [text for at in range(0, len(pairs), pairs_per_forward)
             for text in write_replies(judge, pairs[at:at + pairs_per_forward])]
    scores = torch.tensor([read_reply(judge, text) for text in texts], dtype=torch.float32).view(-1, len(AXES))
    return pad_sequence(scores.split([len(images) for images in candidates]), batch_first=True,
                        padding_value=torch.nan)
