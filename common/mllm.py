"""
The reward model, called the judge: prompt, strict parser, image patches, expected scores, loading and saving.

A multimodal LLM sees an instruction, the low-resolution (LR) image and one super-resolved (SR) candidate, and rates
three axes with one digit each. Two read-outs of the same weights:

sampled    `<thinking>..</thinking><answer>consistency: d, naturalness: d, overall: d</answer>`, one token at a time
           (replies.py)
expected   one forward pass: the expectation over the nine digit tokens after the stem `<answer>overall: `, likewise for
           the other axes; no sampling, so the same images always get the same score

Prompt order is instruction, LR, candidate: all candidates of an LR image share the prefix (token_tree.py).

Shapes: G groups (one LR image each), C candidates, L tokens in a row, B rows, V vocabulary, D hidden size, S features
per image token (1; in Qwen3-VL 1 + layers of DeepStack, arXiv 2406.04334). Images are uint8 [H, W, 3].
"""
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from huggingface_hub.errors import StrictDataclassError
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor
from torch.nn.functional import linear, pad
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModelForImageTextToText, AutoTokenizer, Qwen2VLImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.models.qwen3_vl.modeling_qwen3_vl import BaseModelOutputWithDeepstackFeatures

from common import run, token_tree
from common.candidates import INCONSISTENT, UNNATURAL
from common.config import fail
from common.images import cut, grid, resize
from common.metrics import AXES
from common.prompted import PromptedJudge, load_prompted, written_scores
from common.token_tree import Rows, Segment, collate, image_segment, last_tokens, text_segment

PROMPT_VERSION = 1
FAMILIES = ("qwen2_5_vl", "qwen3_vl")   # dense decoders of softmax attention alone, see token_tree.py
UNTRAINED_MAX_PIXELS = 2**18            # of an image shown to a model that stage 02 has not trained
DIGITS = "123456789"
GRAY = 128                              # of 255: what a blind judge sees in place of LR
FREE = ("groups_per_forward", "groups_per_rollout", "gradient_checkpointing", "save_every")     # settings of 02 that do
                                        # not change the judge
INSTRUCTION = (
    "Image 1 is the low-resolution input, image 2 a super-resolved candidate. Score each from 1 to 9: consistency "
    "of image 2 with image 1, naturalness of image 2, overall. "
    "Reply <thinking>why</thinking><answer>consistency: d, naturalness: d, overall: d</answer>")
ANSWER = re.compile(r"<thinking>((?:(?!</?thinking>|</?answer>).)*)</thinking>"
                    r"<answer>consistency: ([1-9]), naturalness: ([1-9]), overall: ([1-9])</answer>", re.DOTALL)
# Words for the reasoning of the cold start, worst to best
CONSISTENCY_WORDS = ("other content", "far off", "off", "close", "same")
NATURALNESS_WORDS = ("broken", "bad", "fair", "good", "natural")
FAULTS = (*INCONSISTENT, *UNNATURAL)
FACTS = {"base", "base_inside", "dtype", "lr_view", "candidate_view", "max_pixels", "prompt_version", "adapter",
         "blind"}
IMAGE_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>", "<|vision_pad|>")


def parse_reply(text: str) -> dict[str, int] | None:
    """Scores 1..9 per axis, or None when the reply is not exactly in the asked form (never a default score)."""
    match = ANSWER.fullmatch(text)
    return match and dict(zip(AXES, map(int, match.groups()[1:])))


def compose_answer(targets: np.ndarray) -> str:
    """What follows the thought of a reply, from targets [3] in 1..9 (NaN unknown: the mean of the others)."""
    targets = np.where(np.isnan(targets), np.nanmean(targets), targets)
    digits = ", ".join(f"{axis}: {int(d)}" for axis, d in zip(AXES, targets.round().clip(1, 9)))
    return f"<answer>{digits}</answer><|im_end|>"


def compose_reply(targets: np.ndarray, method: str) -> str:
    """A reply in the asked form, from targets [3] in 1..9 (NaN unknown) and the candidate's fault, if known."""
    targets = np.where(np.isnan(targets), np.nanmean(targets), targets)
    levels = ((targets - 1) / 8 * 5).astype(int).clip(0, 4)
    faults = [word.replace("_", " ") for word in method.split("+") if word in FAULTS]
    why = "; ".join([", ".join(faults)] * bool(faults) + [CONSISTENCY_WORDS[levels[0]], NATURALNESS_WORDS[levels[1]]])
    return f"<thinking>{why}</thinking>{compose_answer(targets)}"


def check_views(lr_view: str, candidate_view: str) -> None:
    """AssertionError unless a Judge can have these two views."""
    assert lr_view in ("resized", "native"), f"lr_view must be resized or native, not {lr_view}"
    assert candidate_view in ("image", "clip"), f"candidate_view must be image or clip, not {candidate_view}"
    assert (lr_view, candidate_view) != ("native", "clip"), "candidate_view=clip needs lr_view=resized"


@dataclass
class Judge:
    model: torch.nn.Module          # of one of the FAMILIES, bare or inside a PeftModel
    tokenizer: object
    processor: Qwen2VLImageProcessorPil
    lr_view: str                    # "resized": bicubic to the candidate's size; "native": as it is
    candidate_view: str             # "image": as it is; "clip": two frames, LR then candidate (see pixel_patches)
    device: torch.device
    blind: bool = False             # it sees plain gray in place of LR

    def __post_init__(self):
        encode = self.encode
        check_views(self.lr_view, self.candidate_view)
        self.net.set_attn_implementation({"text_config": token_tree.NAME})
        digits = [encode(d) for d in DIGITS]
        assert all(len(ids) == 1 for ids in digits), "the tokenizer must have one token for each digit 1..9"
        self.digit_ids = torch.tensor(digits, device=self.device)[:, 0]                             # [9]
        self.stems = [encode(f"<answer>{axis}: ") for axis in AXES]
        self.head_ids = encode(f"<|im_start|>user\n{INSTRUCTION}\n<|vision_start|>")
        self.between_ids = encode("<|vision_end|>\n<|vision_start|>")
        self.tail_ids = encode("<|vision_end|><|im_end|>\n<|im_start|>assistant\n")
        self.end_id = self.tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.image_id = self.tokenizer.convert_tokens_to_ids("<|image_pad|>")
        vocabulary = self.tokenizer.get_vocab()
        unused = range(len(self.tokenizer), self.net.lm_head.out_features)          # rows that pad the embedding
        banned = [*(vocabulary[t] for t in IMAGE_TOKENS if t in vocabulary), *unused]
        self.banned_ids = torch.tensor(banned, device=self.device)
        self.head_copy = None

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @property
    def net(self) -> torch.nn.Module:
        """The transformers model itself; LoRA layers, when there are any, live inside it."""
        return self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model

    @property
    def float_head(self) -> Tensor:
        """The head's weight in float32; of a frozen bfloat16 one a copy stays: at 7B, 2 GB once and not per call."""
        weight = self.net.lm_head.weight
        if weight.requires_grad or weight.dtype == torch.float32:
            return weight.float()
        self.head_copy = weight.float() if self.head_copy is None else self.head_copy
        return self.head_copy


def pixel_patches(judge: Judge, groups: list[list[np.ndarray]]) -> tuple[Tensor, Tensor]:
    """
    What the vision tower is fed of groups [LR, candidate 1, .., candidate C]: float32 [patches, 3 * 2 * p * p], and the
    patch grids [images, 3].

    The candidates of a group have one size. Qwen-VL cuts *two frames* into one patch and shows a still image twice;
    with candidate_view "clip" a candidate's first frame is the LR image: a patch holds both.
    """
    pixels, grids = [], []
    for lr, *shown in groups:
        lr = np.full_like(lr, GRAY) if judge.blind else lr
        height, width = shown[0].shape[:2]
        lr = lr if judge.lr_view == "native" else resize(lr, (width, height), "bicubic")
        frames, sizes = zip(*(frame_patches(judge, image) for image in (lr, *shown)))
        for frame in frames:
            first = frames[0] if judge.candidate_view == "clip" else frame
            pixels.append(torch.stack([first, frame], 2).flatten(1))
        grids += [(1, *size) for size in sizes]
    return torch.cat(pixels), torch.tensor(grids)


def frame_patches(judge: Judge, image: np.ndarray) -> tuple[Tensor, tuple[int, int]]:
    """
    Patches of an image as the judge's processor cuts them, but on the judge's device: float32 [patches, 3, p * p],
    those of an image token one after the other; and their rows and columns.
    """
    processor = judge.processor
    p, m, (height, width) = processor.patch_size, processor.merge_size, size_seen(judge, *image.shape[:2])
    if image.shape[:2] != (height, width):
        image = resize(image, (width, height), "bicubic")
    mean, std = torch.tensor([processor.image_mean, processor.image_std], device=judge.device)
    pixels = (torch.from_numpy(image).to(judge.device) / 255 - mean) / std
    patches = pixels.view(height // (p * m), m, p, width // (p * m), m, p, 3).permute(0, 3, 1, 4, 6, 2, 5)
    return patches.reshape(-1, 3, p * p), (height // p, width // p)


def size_seen(judge: Judge, height: int, width: int) -> tuple[int, int]:
    """The size, px, to which the judge's processor resamples an image of this one."""
    processor, budget = judge.processor, judge.processor.size
    unit = processor.patch_size * processor.merge_size
    return smart_resize(height, width, unit, budget["shortest_edge"], budget["longest_edge"])


def check_sizes(judge: Judge | PromptedJudge, sizes: set[tuple[int, int]], remedy: str) -> None:
    """
    Stop with one line if the judge would resample images of one of the sizes (height, width), px; a whole multiple is
    well. Of the finest stripes of 512 px, shown as 504, a third of the contrast is lost.
    """
    if not isinstance(judge.processor, Qwen2VLImageProcessorPil):
        return                              # a PromptedJudge of another family, which has a size of its own
    unit, most = judge.processor.patch_size * judge.processor.merge_size, judge.processor.size["longest_edge"]
    for height, width in sorted(sizes):
        rows, columns = size_seen(judge, height, width)
        if rows % height or columns % width:
            fail(f"the judge would see images of {width} x {height} px resampled to {columns} x {rows}: their sides "
                 f"should be multiples of {unit} px, with at most {most} px in all (max_pixels of stage 02): {remedy}")


def image_features(judge: Judge, groups: list[list[np.ndarray]]) -> tuple[list[Tensor], Tensor]:
    """Features of all images of the groups, in order: a tensor [tokens, S * D] per image, and the grids [images, 3]."""
    pixels, grids = pixel_patches(judge, groups)
    return patch_features(judge, pixels, grids), grids


def tower_trained(judge: Judge) -> bool:
    return any(p.requires_grad for p in judge.net.model.visual.parameters())


def patch_features(judge: Judge, pixels: Tensor, grids: Tensor) -> list[Tensor]:
    """Vision tower over the patches of pixel_patches: a tensor [tokens, S * D] per image, in order."""
    with torch.set_grad_enabled(torch.is_grad_enabled() and tower_trained(judge)):  # frozen: stays out of the graph
        output = judge.net.get_image_features(pixels.to(judge.device, judge.net.dtype), grids.to(judge.device),
                                              return_dict=True)
        stack = [output.pooler_output, *(output.get("deepstack_features") or ())]   # S x images x [tokens, D]
        return [torch.cat(of_image, -1) for of_image in zip(*stack)]


def vision_output(judge: Judge, features: list[Tensor]) -> dict:
    """Image features, [tokens, S * D] each, as transformers' vision tower hands them on to the language model."""
    first, *deepstack = zip(*(f.split(judge.net.config.get_text_config().hidden_size, -1) for f in features))
    return {"image": BaseModelOutputWithDeepstackFeatures(pooler_output=list(first), deepstack_features=deepstack)}


def hidden_states(judge: Judge, rows: Rows, features: list[Tensor], cache=None) -> Tensor:
    """Last hidden states [B, L, D]; `features` in the order in which image tokens occur, row by row."""
    edges = pad((rows.ids == judge.image_id).int(), (1, 1)).diff()                  # [B, L + 1] 1 begins, -1 ends
    tokens = ((edges < 0).nonzero() - (edges > 0).nonzero())[:, 1].tolist()
    lengths = [len(f) for f in features]
    assert tokens == lengths, f"image tokens of each image {tokens}, but image features {lengths}"
    return judge.net.model(
        input_ids=rows.ids, position_ids=rows.positions, attention_mask=rows.mask, past_key_values=cache,
        use_cache=cache is not None, tree=token_tree.branches(rows),
        mm_encoder_outputs=vision_output(judge, features)).last_hidden_state


def policy_logits(judge: Judge, hidden: Tensor) -> Tensor:
    """float32 logits [..., V] of the policy that samples and is trained: image tokens can never be written."""
    logits = linear(hidden.float(), judge.float_head)            # a bfloat16 one near 20 is a multiple of 1/8
    return logits.index_fill(-1, judge.banned_ids, -torch.inf)


def prompt_row(judge: Judge, lr_grid: Tensor, candidate_grids: Tensor) -> list[Segment]:
    """Segment 0 is instruction + LR; segments 1..C are the candidates, each up to the start of the reply."""
    grids, merge = [lr_grid, *candidate_grids], judge.processor.merge_size
    images = [[judge.image_id] * int(grid.prod() // merge**2) for grid in grids]
    root = image_segment(judge.head_ids, images[0], [], grid=lr_grid, merge=merge, parent=-1)
    return [root] + [image_segment(judge.between_ids, image, judge.tail_ids, grid=grid, merge=merge, parent=0)
                     for image, grid in zip(images[1:], candidate_grids)]


def add_stems(judge: Judge, row: list[Segment], candidates: list[int]) -> list[int]:
    """Append the three direct-answer stems below each given candidate segment; returns their indices, [C * 3]."""
    first = len(row)
    row += [text_segment(stem, parent) for parent in candidates for stem in judge.stems]
    return list(range(first, len(row)))


def form_of_reply(judge: Judge, targets: np.ndarray) -> tuple[list[int], list[bool]]:
    """
    Token ids of a reply whose thought is a placeholder, and which of them are taught: where a thought begins and what
    follows it, neither its words nor where it ends. So a model that can reason learns the form and the digits alone.
    """
    begin, thought, end = judge.encode("<thinking>"), judge.encode("why"), judge.encode("</")
    rest = judge.encode(f"</thinking>{compose_answer(targets)}")
    return begin + thought + rest, [True] * len(begin) + [False] * len(thought + end) + [True] * len(rest[len(end):])


def expectations(judge: Judge, trees: list[list[Segment]], stems: list[list[int]], features: list[Tensor]) -> Tensor:
    """Expectations over the nine digits behind stems (segments of each tree), float32 [stems / 3, 3] on the CPU."""
    digits = torch.arange(1, 10, device=judge.device, dtype=torch.float32)
    rows = collate(trees, judge.device)
    logits = policy_logits(judge, hidden_states(judge, rows, features)[last_tokens(rows, stems)])
    return (logits[:, judge.digit_ids].softmax(-1) @ digits).view(-1, len(AXES)).cpu()


@torch.no_grad()
def expected_in_reply(judge: Judge, features: list[Tensor], grids: Tensor, replies: list[list[int] | None]) -> Tensor:
    """
    Expected scores [C, 3] at the places of the three digits of a written reply (token ids) to each candidate of one LR
    image; NaN where there is none. features, grids: of LR, candidate 1..C.
    """
    row, scores = prompt_row(judge, grids[0], grids[1:]), torch.full((len(replies), len(AXES)), torch.nan)
    first, known, digits = len(row), [], set(judge.digit_ids.tolist())
    for c, ids in enumerate(replies):
        places = [p for p, token in enumerate(ids or []) if token in digits][-len(AXES):]
        if len(places) == len(AXES):
            known.append(c)
            row += [text_segment(ids[:p], c + 1) for p in places]
    if known:
        scores[known] = expectations(judge, [row], [list(range(first, len(row)))], features)
    return scores


@torch.no_grad()
def expected_scores(judge: Judge | PromptedJudge, lrs: list[np.ndarray], candidates: list[list[np.ndarray]], *,
                    groups_per_forward: int = 16) -> Tensor:
    """
    Deterministic scores in 1..9 of every candidate of every group, float32 [G, C, 3] on the CPU, axes as in AXES.

    C: the most candidates of a group; NaN where a group has fewer. Candidates do not see each other: a candidate's
    score does not depend on its group's others, on their number or order, or (to rounding) on the batch.
    `groups_per_forward`: memory only. Of a PromptedJudge: the scores that it writes, on its own scale.
    """
    if isinstance(judge, PromptedJudge):
        return written_scores(judge, lrs, candidates, pairs_per_forward=4 * groups_per_forward)
    sizes, scores = [len(images) for images in candidates], []
    for g in range(0, len(lrs), groups_per_forward):
        part = slice(g, g + groups_per_forward)
        features, grids = image_features(judge, [[lr, *images] for lr, images in zip(lrs[part], candidates[part])])
        trees = [prompt_row(judge, of_group[0], of_group[1:]) for of_group in grids.split([1 + n for n in sizes[part]])]
        stems = [add_stems(judge, row, list(range(1, len(row)))) for row in trees]
        scores += expectations(judge, trees, stems, features).split(sizes[part])
    return pad_sequence(scores, batch_first=True, padding_value=torch.nan)


def scores_in_crops(judge: Judge, lrs: np.ndarray, samples: np.ndarray, *, crop: int, limit: int,
                    images_per_forward: int = 128) -> Tensor:
    """
    Mean over crops of expected_scores, [g, K, 3], of uint8 samples [g, K, H, W, 3] of LR images [g, h, w, 3]. Crops
    that a PromptedJudge gave no score (NaN) are left out.

    crop: px of SR, at most `limit` crops, at the same places in LR and all samples; 0: whole images.
    images_per_forward: about, memory only.
    """
    scale, (height, width) = samples.shape[-2] // lrs.shape[-2], lrs.shape[1:3]
    side = max(1, crop // scale) if crop else max(height, width)
    corners = grid(height, width, side, limit)
    scores = expected_scores(
        judge, [cut(lr, corner, side, 1) for lr in lrs for corner in corners],
        [[cut(image, corner, side, scale) for image in group] for group in samples for corner in corners],
        groups_per_forward=min(16, max(1, images_per_forward // samples.shape[1])))
    return scores.unflatten(0, (len(lrs), len(corners))).nanmean(1)


def reply_text(judge: Judge, ids: list[int]) -> str:
    """Text of a reply without its <|im_end|>; a reply that was cut keeps its loose end and will not parse."""
    ids = ids[:-1] if ids and ids[-1] == judge.end_id else ids
    return judge.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


# on disk ---------------------------------------------------------------------------------------------------------

def load_model(source: str | Path, device: torch.device, *, dtype: str, lr_view: str, candidate_view: str,
               blind: bool = False) -> Judge:
    """A frozen judge from a transformers folder or hub id of one of the FAMILIES; others are refused unread."""
    try:
        config = AutoConfig.from_pretrained(source)
        kinds = set(config.get_text_config().to_dict().get("layer_types") or ()) - {"full_attention"}
        if kinds:
            fail(f"model {source}: its decoder has {', '.join(sorted(kinds))} layers, where candidates that share "
                 "a prefix would leak into each other; give a Qwen2.5-VL or Qwen3-VL")
        if config.model_type not in FAMILIES:
            fail(f"model {source} is a {config.model_type}; this code knows dense Qwen2.5-VL and Qwen3-VL")
        model, info = AutoModelForImageTextToText.from_pretrained(        # what does not fit is refused below
            source, dtype=dtype, attn_implementation="sdpa", use_safetensors=True, output_loading_info=True,
            ignore_mismatched_sizes=True, device_map={"": device})        # 8 ranks would fill the machine's memory
        if unfit := sorted(map(str, [*info["missing_keys"], *info["mismatched_keys"]])):
            raise ValueError(f"{len(unfit)} weights are missing or of another size, such as {unfit[0]}")
        processor = Qwen2VLImageProcessorPil.from_pretrained(source)
        tokenizer = AutoTokenizer.from_pretrained(source)
        model = model.eval().requires_grad_(False)
        return Judge(model, tokenizer, processor, lr_view, candidate_view, device, blind)
    except (OSError, ValueError, AssertionError, SafetensorError, StrictDataclassError) as error:
        nowhere = "" if Path(source).exists() else ", and there is no such folder"
        fail(f"model {source}: cannot be loaded{nowhere} ({error}); give the folder of a finished stage 02, or a "
             "folder or hub id of a Qwen2.5-VL or Qwen3-VL")


def save_model(judge: Judge, folder: Path) -> None:
    """Model, or its adapter alone if it has one, tokenizer and image processor in one folder."""
    judge.model.save_pretrained(folder)
    judge.tokenizer.save_pretrained(folder)
    judge.processor.save_pretrained(folder)


def save_judge(judge: Judge, folder: Path, *, base: str | Path) -> None:
    """
    What later stages load: adapter/ (PEFT) on `base`, or the whole model/ if there is no adapter, and judge.json. Both
    folders have the tokenizer and the image processor, with its pixel budget; judge.json has the prompt.

    A base inside the stage's folder is recorded relative to it, so that the run folder can be moved.
    """
    prompt = [*judge.head_ids, judge.image_id, *judge.between_ids, judge.image_id, *judge.tail_ids]
    kind = "adapter" if isinstance(judge.model, PeftModel) else "model"
    save_model(judge, folder / kind)
    base = base if kind == "adapter" else folder / "model"
    inside = Path(base).is_relative_to(folder.parent)
    run.write_json(folder / "judge.json", {
        "base": str(Path(base).relative_to(folder.parent) if inside else base), "base_inside": inside,
        "dtype": str(judge.net.dtype).removeprefix("torch."), "lr_view": judge.lr_view,
        "candidate_view": judge.candidate_view, "blind": judge.blind,
        "max_pixels": judge.processor.size["longest_edge"],
        "prompt_version": PROMPT_VERSION, "adapter": kind == "adapter",
        "prompt": judge.tokenizer.decode(prompt, clean_up_tokenization_spaces=False)})


def load_judge(path: str | Path, device: torch.device) -> Judge | PromptedJudge:
    """
    A frozen judge; stops with one line if there is none at `path`, or one of another prompt version.

    path: folder of a finished stage 02, of any run; or a transformers folder or hub id of a Qwen2.5-VL or Qwen3-VL,
    which is then asked as it is, without training; or the YAML file of a PromptedJudge.
    """
    path = Path(path)
    if path.suffix in (".yaml", ".yml"):
        return load_prompted(path, device)
    if not (path / "judge").is_dir():
        dtype = "bfloat16" if device.type == "cuda" else "float32"
        judge = load_model(path, device, dtype=dtype, lr_view="resized", candidate_view="image")
        judge.processor.size["longest_edge"] = UNTRAINED_MAX_PIXELS
        return judge
    facts, again = run.read_json(path / "judge" / "judge.json"), "delete this folder and run 02_train_reward.py again"
    if lacking := sorted(FACTS - set(facts)):
        fail(f"{path}: judge/judge.json lacks {', '.join(lacking)}; {again}")
    if facts["prompt_version"] != PROMPT_VERSION:
        fail(f"{path}: the judge was trained with prompt version {facts['prompt_version']}, this code has version "
             f"{PROMPT_VERSION}: train it again with 02_train_reward.py and another run=")
    base = path / facts["base"] if facts["base_inside"] else facts["base"]
    judge = load_model(base, device, dtype=facts["dtype"], lr_view=facts["lr_view"],
                       candidate_view=facts["candidate_view"], blind=facts["blind"])
    judge.processor.size["longest_edge"] = facts["max_pixels"]
    if facts["adapter"]:
        judge.model = with_adapter(judge, path / "judge" / "adapter").eval()
    return judge


def with_adapter(judge: Judge, folder: Path, *, trainable: bool = False) -> PeftModel:
    """The judge's model with the LoRA of a folder; stops with one line if it does not fit."""
    try:
        return PeftModel.from_pretrained(judge.model, folder, is_trainable=trainable).to(judge.device)
    except (OSError, ValueError, TypeError, SafetensorError) as error:
        fail(f"{folder} cannot be loaded ({error}); delete {folder.parents[1]} and run 02_train_reward.py again")
