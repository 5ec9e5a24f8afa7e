"""
A Qwen2.5-VL of about a million weights, built from nothing: the demo's reward model, of the same classes as a real one.
"""
import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (PreTrainedTokenizerFast, Qwen2VLImageProcessorPil, Qwen2_5_VLConfig,
                          Qwen2_5_VLForConditionalGeneration)

from common import metrics, mllm, run
from common.mllm import Judge

QWEN_SPLIT = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
              r"|\s+(?!\S)|\s+")                # how the Qwen tokenizers cut text before byte-pair encoding
PATCH = 8                       # px; the language model sees one token per 2 x 2 patches
DIFFERENCE_GAIN = 3             # of 1, 3, 8: at 8 naturalness is learned more slowly
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *mllm.IMAGE_TOKENS]


def build_small(groups: list[list[np.ndarray]], device: torch.device, *, seed: int, width: int, depth: int, heads: int,
                vision_width: int, vision_depth: int, max_pixels: int, lr_view: str, candidate_view: str,
                blind: bool = False) -> Judge:
    """
    A judge around a Qwen2.5-VL with random weights; groups: images [LR, candidate, ..] to whiten on.

    width, depth: of the language model, in features and layers; vision_*: of the vision tower; heads: of both. The
    rest as in mllm.Judge.
    """
    tokenizer = build_tokenizer()
    ids = tokenizer.get_vocab()
    half = width // heads // 2
    sections = [half - 2 * (half * 3 // 8), half * 3 // 8, half * 3 // 8]        # time, height, width
    torch.manual_seed(run.stable_seed(seed, "small model"))
    model = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=3 * width,
            num_hidden_layers=depth, num_attention_heads=heads, num_key_value_heads=heads,
            max_position_embeddings=4096, initializer_range=0.05, bos_token_id=None,
            eos_token_id=ids["<|im_end|>"], pad_token_id=ids["<|endoftext|>"],
            rope_parameters=dict(rope_type="default", rope_theta=10000.0, mrope_section=sections)),
        vision_config=dict(
            depth=vision_depth, hidden_size=vision_width, intermediate_size=2 * vision_width,
            num_heads=heads, patch_size=PATCH, out_hidden_size=width, initializer_range=0.05,
            fullatt_block_indexes=list(range(vision_depth))),
        image_token_id=ids["<|image_pad|>"], video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"], vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=False))
    processor = Qwen2VLImageProcessorPil(
        patch_size=PATCH, merge_size=2, size=dict(shortest_edge=4 * PATCH**2, longest_edge=max_pixels),
        image_mean=[0.5] * 3, image_std=[0.25] * 3)
    judge = Judge(model.to(device), tokenizer, processor, lr_view, candidate_view, device, blind)
    whiten_patches(judge, groups)
    return judge


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-pair encoding with Qwen's splitting rule and special tokens, learned from our own prompt and replies."""
    faults = " ".join(f"<thinking>{word}, {word};" for word in mllm.FAULTS).replace("_", " ")
    levels = " ".join(f"; {word}; {word}<" for word in mllm.CONSISTENCY_WORDS + mllm.NATURALNESS_WORDS)
    texts = [mllm.INSTRUCTION, "user\n", "assistant\n", faults, levels, mllm.compose_reply(np.ones(3), ""),
             *(f"<answer>{axis}: " for axis in metrics.AXES)] * 4
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(QWEN_SPLIT), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=1024, special_tokens=SPECIAL_TOKENS, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False))
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|im_end|>", pad_token="<|endoftext|>",
                                   additional_special_tokens=SPECIAL_TOKENS)


@torch.no_grad()
def whiten_patches(judge: Judge, groups: list[list[np.ndarray]]) -> None:
    """
    Start the patch embedding as a cosine basis, low frequencies first, each filter divided by its spread on the groups.

    From random filters the small model stays blind to fine detail, which is faint beside a patch's mean. With two-frame
    clips a sixth of the filters sees the difference of the frames (LR, candidate), the others see the candidate. The
    differences are made DIFFERENCE_GAIN times as strong: else a judge hardly learns consistency in 450 steps.
    """
    weight = judge.net.model.visual.patch_embed.proj.weight                      # [width, 3, 2, p, p]
    width, p = len(weight), weight.shape[-1]
    k = np.arange(p)
    cosine = np.cos(np.pi * (2 * k + 1) * k[:, None] / (2 * p))                  # [frequency, px]
    order = sorted(((u, v) for u in range(p) for v in range(p)), key=lambda uv: (sum(uv), uv))
    luma, blue, red = (.299, .587, .114), (-.169, -.331, .5), (.5, -.419, -.081)
    few = width // 12
    plan = [(luma, width - 4 * few, (.5, .5)), (blue, 2 * few, (.5, .5)), (red, 2 * few, (.5, .5))]
    if judge.candidate_view == "clip":
        plan = [(luma, width - 4 * few, (0, 1)), (blue, few, (0, 1)), (red, few, (0, 1)),
                (luma, few, (-1, 1)), (blue, few // 2, (-1, 1)), (red, few // 2, (-1, 1))]
    filters = torch.tensor(np.stack([
        np.einsum("c,t,h,w->cthw", color, frames, cosine[u], cosine[v])
        for color, count, frames in plan for u, v in order[:count]]), dtype=torch.float32)     # [<= width, 3, 2, p, p]
    pixels, _ = mllm.pixel_patches(judge, groups)                                # [patches, 3 * 2 * p * p]
    spread = (pixels.cpu() @ filters.flatten(1).T).std(0)
    weight[:len(filters)] = filters / (spread + 1e-3)[:, None, None, None, None]
    if judge.candidate_view == "clip":
        weight[len(filters) - 2 * few:len(filters)] *= DIFFERENCE_GAIN
