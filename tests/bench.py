"""
How fast the reward model trains and scores, beside the plain way and, where it is installed, beside TRL.

Run     python tests/bench.py               # a few minutes on two cores; for TRL: pip install trl
Writes  runs/bench/results.json

Everything in one run, on one machine, with the demo's model (random weights), prompts of about 600 tokens (256-px
images), replies of 32 tokens that cannot end early, K = 8 replies for each of 8 prompts (2 LR images x 4 candidates).
The ways take turns; a ratio is the median over the rounds.

ours    stage 02's own GRPO step, which besides K replies writes, scores and trains on digits behind three stems
plain   transformers' `generate`, then one row per reply with full logits: reference, policy, gradient, AdamW
trl     TRL's GRPOTrainer on the same prompts, images, K, reply length and KL term
"""
import importlib.util
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1" if len(sys.argv) > 1 else str(os.cpu_count()))   # the child: one
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch

from conftest import ROOT, load_stage, make_images                     # first: it finds common/
import plain_rows
from common import grpo, mllm
from common.groups import Cohort
from common.images import resize
from common.replies import Images, answer_logp, encode, look_at
from common.training import copied, trainable

LRS, CANDIDATES, SIZE, TOKENS, K = 2, 4, 256, 32, 8
stage = load_stage("02")


def build() -> tuple:
    """cfg, judge, reference, cohorts; replies never end, so that all ways write TOKENS tokens."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cfg = stage.Config(
        run="", candidate_view="image", max_pixels=SIZE * SIZE, lora_rank=0, replies=K, direct_replies=8,
        max_reply_tokens=TOKENS, groups_per_step=LRS, reasoned_groups=LRS, groups_per_forward=1, lr=1e-5)
    cohorts = []
    for i in range(LRS):
        lr, *images = make_images(i, SIZE, SIZE, count=CANDIDATES)
        ranks = np.tile(np.arange(1.0, 1 + CANDIDATES)[:, None], (1, 3))
        cohorts.append(Cohort(f"lr{i}", lr, images, [""] * CANDIDATES, ranks, 9 - ranks))
    judge, reference = (stage.first_judge(cfg, cohorts, torch.device("cpu")) for _ in range(2))
    for each in (judge, reference):
        each.banned_ids = torch.cat([each.banned_ids, torch.tensor([each.end_id])])
    reference.model.eval().requires_grad_(False)
    return cfg, judge, reference, cohorts


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


def take_turns(ways: dict, rounds: int) -> dict[str, list[float]]:
    """Seconds of each way in each round; the first round warms up."""
    times = [{name: seconds(work) for name, work in ways.items()} for _ in range(rounds + 1)][1:]
    return {name: [row[name] for row in times] for name in ways}


# the plain way ---------------------------------------------------------------------------------------------

def plain_logp(judge: mllm.Judge, images: list[Images], texts: list[list[int]], replies: list[list[int]]):
    """Log-probabilities [rows, T] with all logits of all rows; texts: prompt and reply, one row each."""
    features, grids = encode(judge, images)
    pairs, rows, at = list(zip(features, grids)), [], 0
    k = len(replies) // sum(len(shown.grids) - 1 for shown in images)
    for shown in images:
        rows += [[pairs[at], pairs[at + c]] for c in range(1, len(shown.grids)) for _ in range(k)]
        at += len(shown.grids)
    inputs = plain_rows.model_inputs(judge, [text + reply for text, reply in zip(texts, replies)], rows)
    logits = judge.net(**inputs, use_cache=False).logits[:, -TOKENS - 1:-1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(replies)[..., None])[..., 0]


def prompts_of(judge: mllm.Judge, images: list[Images]) -> list[list[int]]:
    trees = [mllm.prompt_row(judge, shown.grids[0], shown.grids[1:]) for shown in images]
    return [tree[0].ids + candidate.ids for tree in trees for candidate in tree[1:]]


def plain_step(cfg, judge, reference, cohorts: list[Cohort], optimizers: dict) -> None:
    images = [look_at(judge, cohort, 0) for cohort in cohorts]
    with torch.no_grad():
        features, grids = encode(judge, images)
        uniforms = torch.rand(len(cohorts) * CANDIDATES, K, TOKENS)
        written = plain_rows.generate(judge, features, grids, uniforms, [CANDIDATES] * len(cohorts))
    advantages = grpo.group_advantages(torch.tensor([[len(set(ids)) / TOKENS for ids in row] for row in written]))
    texts = [ids for ids in prompts_of(judge, images) for _ in range(K)]
    replies, size = [ids for row in written for ids in row], CANDIDATES * K
    for i, shown in enumerate(images):
        part = slice(i * size, (i + 1) * size)
        with torch.no_grad():
            ref = plain_logp(reference, [shown], texts[part], replies[part])
        logp = plain_logp(judge, [shown], texts[part], replies[part])
        loss, _ = grpo.grpo_loss(logp, logp.detach(), advantages.flatten()[part], ref_logp=ref, kl_weight=cfg.kl_weight,
                                 clip_low=0.2, clip_high=0.2, denominator=len(replies) * TOKENS)
        loss.backward()
    optimizers["adamw"].step()
    optimizers["adamw"].zero_grad()


# TRL -------------------------------------------------------------------------------------------------------

TEMPLATE = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{% for c in m.content %}{% if c.type == 'image' %}"
            "<|vision_start|><|image_pad|><|vision_end|>\n{% else %}{{ c.text }}{% endif %}{% endfor %}<|im_end|>\n"
            "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")


def trl_rounds(cfg, judge, cohorts: list[Cohort], rounds: int, others: dict) -> dict[str, list[float]]:
    """Seconds per step of TRL and of the other ways, which take their turn after each step of TRL's."""
    import datasets
    import trl
    from PIL import Image
    from transformers import Qwen2_5_VLProcessor, TrainerCallback
    from transformers.processing_utils import ProcessorMixin

    ProcessorMixin.check_argument_for_proper_class = lambda *_: None        # no video processor: no torchvision
    times = {"trl": [], **{name: [] for name in others}}

    class Turns(TrainerCallback):
        def on_step_begin(self, *_, **rest):
            self.begun = time.perf_counter()

        def on_step_end(self, *_, **rest):
            times["trl"].append(time.perf_counter() - self.begun)
            for name, work in others.items():
                times[name].append(seconds(work))

    message = [{"role": "user", "content": [{"type": "text", "text": mllm.INSTRUCTION}, *[{"type": "image"}] * 2]}]
    rows = [{"prompt": message, "images": [Image.fromarray(resize(c.lr, (SIZE, SIZE), "bicubic")),
                                           Image.fromarray(image)]} for c in cohorts for image in c.images]
    with tempfile.TemporaryDirectory() as folder:
        mllm.save_model(judge, Path(folder))
        model = type(judge.net).from_pretrained(folder, attn_implementation="sdpa")
        processor = Qwen2_5_VLProcessor(judge.processor, judge.tokenizer, None, chat_template=TEMPLATE)
        trainer = trl.GRPOTrainer(
            model, reward_funcs=lambda completions, **rest: [float(len(str(text)) % 7) for text in completions],
            processing_class=processor, train_dataset=datasets.Dataset.from_list(rows * (rounds + 1)),
            callbacks=[Turns()], args=trl.GRPOConfig(
                output_dir=folder, per_device_train_batch_size=CANDIDATES * K, num_generations=K,
                gradient_accumulation_steps=len(cohorts), max_completion_length=TOKENS, beta=cfg.kl_weight,
                max_steps=rounds + 1, learning_rate=cfg.lr, use_cpu=True, bf16=False, gradient_checkpointing=False,
                generation_kwargs={"min_new_tokens": TOKENS}, report_to=[], save_strategy="no", disable_tqdm=True,
                logging_strategy="no", shuffle_dataset=False))
        trainer.train()
    return {name: values[1:] for name, values in times.items()}                 # the first round warms up


# scores and memory -----------------------------------------------------------------------------------------

@torch.no_grad()
def call_per_axis(judge: mllm.Judge, lr: np.ndarray, image: np.ndarray) -> None:
    """One image as a plain call of transformers scores it (README, "Use the judge elsewhere"), for each axis anew."""
    for stem in judge.stems:
        features, grids = mllm.image_features(judge, [[lr, image]])
        root, candidate = mllm.prompt_row(judge, grids[0], grids[1:])
        inputs = plain_rows.model_inputs(judge, [root.ids + candidate.ids + stem], [list(zip(features, grids))])
        judge.net(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, judge.digit_ids].float().softmax(-1)


def peak_mb(way: str) -> float:
    """How much the forward and backward pass of the loss of one LR's replies adds to resident memory, MB (Linux)."""
    _, judge, _, cohorts = build()
    images = [look_at(judge, cohorts[0], 0)]
    replies = [[list(range(40, 40 + TOKENS)) for _ in range(K)] for _ in range(CANDIDATES)]
    texts = [ids for ids in prompts_of(judge, images) for _ in range(K)]
    torch.zeros(4, 4).matmul(torch.zeros(4, 4))
    Path("/proc/self/clear_refs").write_text("5")                       # forget the peak so far
    before = resident("VmRSS")
    if way == "plain":
        logp = plain_logp(judge, images, texts, [ids for row in replies for ids in row])
    else:
        logp = answer_logp(judge, *encode(judge, images), [replies], judge.digit_ids.expand(3 * CANDIDATES, -1))[0]
    logp.mean().backward()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) / 1024


def in_a_child(way: str) -> float:
    return float(subprocess.run([sys.executable, __file__, way], capture_output=True, text=True, cwd=ROOT, check=True,
                                env=os.environ | {"OMP_NUM_THREADS": "1"}).stdout.split()[-1])


# the table -------------------------------------------------------------------------------------------------

def main(rounds: int = 3) -> None:
    cfg, judge, reference, cohorts = build()
    optimizers, count = stage.make_optimizers(trainable(judge.model), cfg.lr), itertools.count()
    start = copied(trainable(judge.model))
    ways = {"ours": lambda: stage.grpo_step(judge, start, cfg, optimizers, cohorts, next(count)),
            "plain": lambda: plain_step(cfg, judge, reference, cohorts, optimizers)}
    with_trl = importlib.util.find_spec("trl") is not None
    steps = trl_rounds(cfg, judge, cohorts, rounds, ways) if with_trl else take_turns(ways, rounds)
    cohort = cohorts[0]
    scores = take_turns({
        "ours": lambda: mllm.expected_scores(judge, [cohort.lr], [cohort.images]),
        "ours, one at a time": lambda: [mllm.expected_scores(judge, [cohort.lr], [[one]]) for one in cohort.images],
        "a call per image and axis": lambda: [call_per_axis(judge, cohort.lr, one) for one in cohort.images],
    }, 2 * rounds)
    memory = {way: in_a_child(way) for way in ("ours", "plain")}
    results = {"reward_step_seconds": steps, "score_seconds": scores, "loss_memory_mb": memory,
               "cores": os.cpu_count(), "torch": torch.__version__}
    for title, times in (("GRPO step of the reward model", steps), ("scores of the candidates of an LR image", scores)):
        print(f"\n{title}")
        for name, values in times.items():
            ratio = statistics.median(a / b for a, b in zip(values, times["ours"]))
            print(f"  {name:<26}{statistics.median(values):8.3f} s   {ratio:6.2f} x ours")
    print("\nmemory of the loss of one LR image's replies, forward and backward")
    for way, value in memory.items():
        print(f"  {way:<26}{value:8.0f} MB")
    out = ROOT / "runs" / "bench" / "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    if len(sys.argv) > 1:
        print(peak_mb(sys.argv[1]))
    else:
        main()
