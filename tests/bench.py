"""
How fast reward training, scoring and SR training are, beside the plain way and beside published tools.

Run     python tests/bench.py               # two cores: see README for the time; peers: pip install trl prefix-grouper
Writes  runs/bench/results.json

Everything in one run, on one machine, with the demo's model (random weights), prompts of about 600 tokens (256-px
images), replies of 32 tokens that cannot end early, K replies for each of 8 prompts (2 LR images x 4 candidates). The
ways take turns; a ratio is the median over the rounds.

ours        stage 02's own GRPO step, which besides K replies writes, scores and trains on digits behind three stems
plain       transformers' `generate`, then one row per reply with full logits: reference, policy, gradient, AdamW
trl         TRL's GRPOTrainer on the same prompts, images, K, reply length and KL term
limit       seconds for the tokens that any method must compute (each prefix and each image once, each reply token
            once in sampling, reference and policy) at the throughput of plain rows of a prompt in one batch: forward
            for the first two, forward and backward for the last
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
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1" if len(sys.argv) > 1 else str(os.cpu_count()))   # children: one each
sys.path.insert(0, str(Path(__file__).resolve().parent))

import numpy as np
import torch

from conftest import ROOT, load_stage, make_images
import plain_rows
from common import dist, grpo, mllm, sr_policy, token_tree
from common.groups import Cohort
from common.images import resize
from common.replies import Images, answer_logp, encode, look_at
from common.small_mllm import build_small
from common.reward_training import optimizers

LRS, CANDIDATES, SIZE, TOKENS = 2, 4, 256, 32


# what is measured ------------------------------------------------------------------------------------------

def build(k: int, vocabulary: int = 0) -> tuple:
    """cfg, judge, reference, cohorts; replies never end, so that all ways write TOKENS tokens."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    cfg = load_stage("02").Config(
        run="", candidate_view="image", max_pixels=SIZE * SIZE, lora_rank=0, replies=k, direct_replies=8,
        max_reply_tokens=TOKENS, groups_per_step=LRS, reasoned_groups=LRS, groups_per_forward=1, lr=1e-5)
    cohorts = []
    for i in range(LRS):
        lr, *images = make_images(i, SIZE, SIZE, count=CANDIDATES)
        ranks = np.tile(np.arange(1.0, 1 + CANDIDATES)[:, None], (1, 3))
        cohorts.append(Cohort(f"lr{i}", lr, images, [""] * CANDIDATES, ranks, 9 - ranks))
    judge = build_small(cfg, [[c.lr, *c.images] for c in cohorts], torch.device("cpu"))
    if vocabulary:
        judge.net.resize_token_embeddings(vocabulary, mean_resizing=False)
    judge.banned_ids = torch.cat([judge.banned_ids, torch.tensor([judge.end_id])])
    judge.model.eval().requires_grad_(True)
    reference = replace(judge, model=build_small(cfg, [[c.lr, *c.images] for c in cohorts], judge.device).model.eval())
    reference.model.requires_grad_(False)
    reference.banned_ids = judge.banned_ids
    return cfg, judge, reference, cohorts


def our_step(cfg, judge, reference, cohorts: list[Cohort], chosen: dict, step: int) -> None:
    load_stage("02").grpo_step(judge, reference, cfg, chosen, cohorts, step)


def plain_logp(judge: mllm.Judge, images: list[Images], texts: list[list[int]], replies: list[list[int]]):
    """Log-probabilities [rows, T] with all logits of all rows; texts: prompt and reply, one row each."""
    features, grids = encode(judge, images)
    given, own, at = list(zip(features, grids)), [], 0
    k = len(replies) // sum(len(shown.grids) - 1 for shown in images)
    for shown in images:
        own += [[given[at], given[at + c]] for c in range(1, len(shown.grids)) for _ in range(k)]
        at += len(shown.grids)
    inputs = plain_rows.model_inputs(judge, [text + reply for text, reply in zip(texts, replies)], own)
    logits = judge.net(**inputs, use_cache=False).logits[:, -TOKENS - 1:-1]
    return logits.float().log_softmax(-1).gather(-1, torch.tensor(replies)[..., None])[..., 0]


def prompts_of(judge: mllm.Judge, images: list[Images]) -> list[list[int]]:
    trees = [mllm.prompt_row(judge, own.grids[0], own.grids[1:]) for own in images]
    return [tree[0].ids + candidate.ids for tree in trees for candidate in tree[1:]]


def plain_step(cfg, judge, reference, cohorts: list[Cohort], chosen: dict) -> None:
    images = [look_at(judge, cohort, 0) for cohort in cohorts]
    with torch.no_grad():
        features, grids = encode(judge, images)
        n = len(cohorts) * CANDIDATES
        written = plain_rows.generate(judge, features, grids, torch.rand(n, cfg.replies, TOKENS),
                                    [CANDIDATES] * len(cohorts))
    rewards = torch.tensor([[len(set(ids)) / TOKENS for ids in own] for own in written])
    advantages = grpo.group_advantages(rewards)
    texts = [ids for ids in prompts_of(judge, images) for _ in range(cfg.replies)]
    replies, size = [ids for own in written for ids in own], CANDIDATES * cfg.replies
    for i, own in enumerate(images):
        part = slice(i * size, (i + 1) * size)
        with torch.no_grad():
            ref = plain_logp(reference, [own], texts[part], replies[part])
        logp = plain_logp(judge, [own], texts[part], replies[part])
        loss, _ = grpo.grpo_loss(logp, logp.detach(), advantages.flatten()[part, None].expand_as(logp), ref_logp=ref,
                                 mask=torch.ones_like(logp, dtype=torch.bool), kl_weight=cfg.kl_weight,
                                 clip_low=0.2, clip_high=0.2, denominator=len(replies) * TOKENS)
        loss.backward()
    for optimizer in chosen.values():
        optimizer.step()
        optimizer.zero_grad()


def seconds(work) -> float:
    begun = time.perf_counter()
    work()
    return time.perf_counter() - begun


# limit -----------------------------------------------------------------------------------------------------

def limit(cfg, judge, cohorts: list[Cohort]) -> dict:
    """Tokens that must be computed, and the seconds they take at the throughput of a batch of plain prompts."""
    images = [look_at(judge, cohort, 0) for cohort in cohorts]
    texts, rows = prompts_of(judge, images), torch.tensor(prompts_of(judge, images))
    features, grids = encode(judge, images)
    given = [f.detach() for f in features]
    own = [[(given[at], grids[at]), (given[at + c], grids[at + c])]
           for at in range(0, len(given), 1 + CANDIDATES) for c in range(1, 1 + CANDIDATES)]
    inputs = plain_rows.model_inputs(judge, texts, own)

    def forward():
        with torch.no_grad():
            judge.net.model(**inputs, use_cache=False)

    def backward():
        judge.net.model(**inputs, use_cache=False).last_hidden_state.sum().backward()
        judge.model.zero_grad()

    def look(train: bool):
        with torch.set_grad_enabled(train):
            found = encode(judge, images)[0]
        if train:
            torch.cat(found).sum().backward()
            judge.model.zero_grad()

    each = [statistics.median(seconds(work) for _ in range(3)) for work in (
        forward, backward, lambda: look(False), lambda: look(True))]
    trees = [mllm.prompt_row(judge, own.grids[0], own.grids[1:]) for own in images]
    prefix = sum(len(s.ids) for tree in trees for s in tree)
    written = len(texts) * cfg.replies * TOKENS
    needed = prefix + written                                           # of one pass
    total = needed * (2 * each[0] + each[1]) / rows.numel() + 2 * each[2] + each[3]
    return {"prompt_tokens": len(texts[0]), "tokens_needed": 3 * needed,
            "tokens_plain": len(texts) * len(texts[0]) + written + 2 * (rows.numel() * cfg.replies + written),
            "seconds": total, "forward_tokens_per_second": rows.numel() / each[0],
            "forward_backward_tokens_per_second": rows.numel() / each[1]}


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

    pass
    ProcessorMixin.check_argument_for_proper_class = lambda *given: None        # no video processor: no torchvision
    found = {"trl": [], **{name: [] for name in others}}

    class Turns(TrainerCallback):
        def on_step_begin(self, *given, **rest):
            self.begun = time.perf_counter()

        def on_step_end(self, *given, **rest):
            found["trl"].append(time.perf_counter() - self.begun)
            for name, work in others.items():
                found[name].append(seconds(work))

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
                output_dir=folder, per_device_train_batch_size=CANDIDATES * cfg.replies, num_generations=cfg.replies,
                gradient_accumulation_steps=len(cohorts), max_completion_length=TOKENS, beta=cfg.kl_weight,
                max_steps=rounds + 1, learning_rate=cfg.lr, use_cpu=True, bf16=False, gradient_checkpointing=False,
                generation_kwargs={"min_new_tokens": TOKENS}, report_to=[], save_strategy="no", disable_tqdm=True,
                logging_strategy="no", shuffle_dataset=False))
        trainer.train()
    return {name: values[1:] for name, values in found.items()}                 # the first round warms up


def rounds_of(cfg, judge, cohorts: list[Cohort], rounds: int, others: dict) -> dict[str, list[float]]:
    if importlib.util.find_spec("trl"):
        return trl_rounds(cfg, judge, cohorts, rounds, others)
    found = [{name: seconds(work) for name, work in others.items()} for _ in range(rounds + 1)][1:]
    return {name: [row[name] for row in found] for name in others}


# prefix-grouper --------------------------------------------------------------------------------------------

def grouper_logp(judge, images: Images, replies: list[list[list[int]]]) -> torch.Tensor:
    """
    Log-probabilities of all reply tokens with prefix-grouper's attention: one row [prompt | K replies] per candidate.

    Its attention takes the place of the text model's; rows, positions, and logits are ours.
    """
    from prefix_grouper import PrefixGrouper
    from prefix_grouper.utils.register_transformers import register_attention
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask

    def causal(module, q, k, v, mask, **rest):                              # mask: padding alone, as FlashAttention's
        ahead = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(k.shape[2] - q.shape[2])
        return sdpa_attention_forward(module, q, k, v, ahead & mask[:, None, None].bool(), **rest)

    register_attention(), AttentionInterface.register("causal_sdpa", causal)
    AttentionMaskInterface.register("prefix_grouper_attention", sdpa_mask)
    features, grids = encode(judge, [images])
    trees, given = [], []
    for c, own in enumerate(replies, 1):
        root, candidate = mllm.prompt_row(judge, grids[0], grids[c:c + 1])
        places = np.concatenate([root.positions, candidate.positions + root.span], 1)
        prompt = token_tree.Segment(root.ids + candidate.ids, places, root.span + candidate.span, -1)
        trees.append([prompt, *(token_tree.text_segment(ids, 0) for ids in own)])
        given += [features[0], features[c]]
    rows = token_tree.collate(trees, judge.device)
    groups = PrefixGrouper([[len(segment.ids) for segment in tree] for tree in trees], device="cpu")
    judge.net.set_attn_implementation({"text_config": "prefix_grouper_attention"})
    hidden = judge.net.model(input_ids=rows.ids, position_ids=rows.positions, attention_mask=groups.padding_mask,
                             use_cache=False, mm_encoder_outputs=mllm.vision_output(judge, given),
                             prefix_grouper=groups, prefix_grouper_attn_func="causal_sdpa").last_hidden_state
    judge.net.set_attn_implementation({"text_config": token_tree.NAME})
    written = [(b, k) for b, tree in enumerate(trees) for k in range(1, len(tree))]
    b, column, token = token_tree.reply_tokens(rows, written)
    return mllm.policy_logits(judge, hidden[b, column]).log_softmax(-1).gather(-1, token[:, None])[:, 0]


def losses(cfg, judge, cohorts: list[Cohort], rounds: int) -> dict[str, list[float]]:
    """Forward and backward pass of the replies of one LR image: ours, and prefix-grouper's where it is installed."""
    images = look_at(judge, cohorts[0], 0)
    replies = [[list(range(40, 40 + TOKENS)) for _ in range(cfg.replies)] for _ in range(CANDIDATES)]

    def ours() -> torch.Tensor:
        digits = judge.digit_ids.expand(3 * CANDIDATES, -1)
        return answer_logp(judge, *encode(judge, [images]), [replies], digits)[0].flatten()
    ways = {"ours": ours}
    if importlib.util.find_spec("prefix_grouper"):
        ways["prefix-grouper"] = lambda: grouper_logp(judge, images, replies)
        assert torch.allclose(ways["prefix-grouper"](), ours(), atol=1e-3), "prefix-grouper computes something else"
    found = {name: [] for name in ways}
    for _ in range(rounds + 1):
        for name, work in ways.items():
            found[name].append(seconds(lambda: work().sum().backward()))
            judge.model.zero_grad()
    return {name: values[1:] for name, values in found.items()}


# scoring and SR training -----------------------------------------------------------------------------------

@torch.no_grad()
def call_per_axis(judge: mllm.Judge, lr: np.ndarray, image: np.ndarray) -> None:
    """One image as a plain call of transformers scores it (README, "Use the judge elsewhere"), for each axis anew."""
    for stem in judge.stems:
        features, grids = mllm.image_features(judge, [[lr, image]])
        root, candidate = mllm.prompt_row(judge, grids[0], grids[1:])
        inputs = plain_rows.model_inputs(judge, [root.ids + candidate.ids + stem], [list(zip(features, grids))])
        judge.net(**inputs, logits_to_keep=1, use_cache=False).logits[:, -1, judge.digit_ids].float().softmax(-1)


def scoring(judge, cohorts: list[Cohort], rounds: int) -> dict[str, list[float]]:
    ways = {"ours": lambda c: mllm.expected_scores(judge, [c.lr], [c.images]),
            "a call per image and axis": lambda c: [call_per_axis(judge, c.lr, image) for image in c.images],
            "ours, one at a time": lambda c: [mllm.expected_scores(judge, [c.lr], [[image]]) for image in c.images]}
    found = {name: [] for name in ways}
    for n in range(rounds + 1):
        for name, work in ways.items():
            found[name].append(seconds(lambda: work(cohorts[n % len(cohorts)])))
    return {name: values[1:] for name, values in found.items()}


def sr_training(rounds: int) -> dict[str, list[float]]:
    """Seconds of stage 04's step, 20 denoising steps as in configs/full.yaml: window of 3 trained, and all 19."""
    stage, found = load_stage("04"), {"window": [], "full trajectory": []}
    groups = [make_images(i, 64, 64, count=1) for i in range(2)]
    lr, hr = (torch.tensor(np.stack(own)).permute(0, 3, 1, 2) / 255 for own in zip(*groups))
    judge = build_small(load_stage("02").Config(run=""), [list(group) for group in groups], torch.device("cpu"))
    policy, reference = (sr_policy.new_policy(hr, lr, steps=20, channels=[32, 64], seed=0).eval()
                         for _ in range(2))
    optimizer = torch.optim.AdamW(policy.unet.parameters(), lr=1e-6)

    def step(width: int) -> None:
        cfg = stage.Config(run="", denoise_steps=20, window_width=width, inputs_per_step=2, samples_per_input=8)
        rollouts = stage.roll_out(policy, cfg, lr, ids=["a", "b"], step=0)
        judged, fidelity = stage.score(judge, cfg, lr, torch.cat([rollout.images for rollout in rollouts]))
        advantages, _ = stage.advantages_of(cfg, judged, fidelity)
        stage.learn(policy, reference, cfg, rollouts=rollouts, advantages=advantages.flatten(), optimizer=optimizer)

    for _ in range(rounds + 1):
        for name, width in (("window", 3), ("full trajectory", 19)):
            found[name].append(seconds(lambda: step(width)))
    return {name: values[1:] for name, values in found.items()}


# children: memory and several processes --------------------------------------------------------------------

def peak_mb(way: str, k: int, vocabulary: int) -> float:
    """How much the forward and backward pass of the loss of one LR's replies adds to resident memory, MB (Linux)."""
    _, judge, _, cohorts = build(k, vocabulary)
    count = 1 if vocabulary else CANDIDATES                              # or the plain way would need 12 GB
    images = [look_at(judge, replace(cohorts[0], images=cohorts[0].images[:count]), 0)]
    replies = [[list(range(40, 40 + TOKENS)) for _ in range(k)] for _ in range(count)]
    texts = [ids for ids in prompts_of(judge, images) for _ in range(k)]
    torch.zeros(4, 4).matmul(torch.zeros(4, 4))
    Path("/proc/self/clear_refs").write_text("5")                       # forget the peak so far
    before = resident("VmRSS")
    if way == "plain":
        logp = plain_logp(judge, images, texts, [ids for own in replies for ids in own])
    else:
        logp = answer_logp(judge, *encode(judge, images), [replies], judge.digit_ids.expand(3 * count, -1))[0]
    logp.mean().backward()
    return resident("VmHWM") - before


def resident(name: str) -> float:
    line = next(own for own in Path("/proc/self/status").read_text().splitlines() if own.startswith(name))
    return int(line.split()[1]) / 1024


def worker(rounds: int) -> list[float]:
    """Seconds per step under torchrun: as much work for each process, however many there are."""
    pass
    dist.init()
    cfg, judge, reference, cohorts = build(8)
    n = dist.world_size()
    cohorts = [replace(c, id=f"{c.id} {i}") for i in range(n) for c in cohorts]
    cfg = replace(cfg, groups_per_step=LRS * n, reasoned_groups=LRS * n)
    chosen = optimizers(judge, cfg.lr, 0.0)
    found = [seconds(lambda: our_step(cfg, judge, reference, cohorts, chosen, s)) for s in range(rounds + 1)][1:]
    main_rank = dist.is_main()
    dist.finish()
    return found if main_rank else []


def child(*words: object, processes: int = 0) -> list[float]:
    launcher = [sys.executable] + (["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
                                   if processes else [])
    done = subprocess.run([*launcher, __file__, *map(str, words)], capture_output=True, text=True, cwd=ROOT,
                          env=os.environ | {"OMP_NUM_THREADS": "1"})
    lines = [line for line in done.stdout.splitlines() if line.startswith("[")]
    if done.returncode or not lines:
        sys.exit(done.stderr)
    return max((json.loads(line) for line in lines), key=len)


# the table -------------------------------------------------------------------------------------------------

def ratio(slow: list[float], fast: list[float]) -> float:
    return round(statistics.median(a / b for a, b in zip(slow, fast)), 2)


def reward_step(k: int, rounds: int) -> dict:
    """Steps of all ways in turn, at K replies."""
    cfg, judge, reference, cohorts = build(k)
    chosen, count, limits = optimizers(judge, cfg.lr, 0.0), itertools.count(), []
    found = rounds_of(cfg, judge, cohorts, rounds, {
        "ours": lambda: our_step(cfg, judge, reference, cohorts, chosen, next(count)),
        "plain": lambda: plain_step(cfg, judge, reference, cohorts, chosen),
        "limit": lambda: limits.append(limit(cfg, judge, cohorts))})
    needed = [own["seconds"] for own in limits[-rounds:]]
    samples = LRS * CANDIDATES * k
    print(f"\nreward GRPO step, K = {k}: {samples} replies of {TOKENS} tokens, prompts of "
          f"{limits[0]['prompt_tokens']}; tokens that must be computed {limits[0]['tokens_needed']}, plain "
          f"{limits[0]['tokens_plain']}")
    for name in ("ours", "plain", "trl"):
        times = found.get(name)
        print(f"  {name:<8}" + (f"{statistics.median(times):7.2f} s   {samples / statistics.median(times):7.2f} "
                                "samples/s" if times else "   not installed"))
    print(f"  limit   {statistics.median(needed):7.2f} s")
    return {"reward_step_vs_trl": ratio(found["trl"], found["ours"]) if "trl" in found else None,
            "reward_step_vs_plain": ratio(found["plain"], found["ours"]),
            "limit_fraction": ratio(needed, found["ours"]), "seconds": {n: v for n, v in found.items() if n != "limit"},
            "limit": limits[-1]}


def main(rounds: int = 3) -> None:
    started = time.time()
    full, pair = reward_step(8, rounds), reward_step(2, rounds)
    cfg, judge, _, cohorts = build(8)
    loss, scores = losses(cfg, judge, cohorts, 2 * rounds), scoring(judge, cohorts, 2 * rounds)
    sr = sr_training(rounds)
    for title, found in (("loss of one LR image's replies, forward and backward", loss),
                         ("scores of the 4 candidates of an LR image", scores), ("SR step", sr)):
        print(f"\n{title}")
        for name, values in found.items():
            print(f"  {name:<26}{statistics.median(values):7.3f} s")
    memory = {f"K={k}, vocabulary {v or 'demo'}": [child("memory", way, k, v)[0] for way in ("ours", "plain")]
              for k, v in ((8, 0), (2, 0), (2, 151936))}
    print("\nmemory of the loss, forward and backward, of one LR image: ours, plain, MB")
    for name, values in memory.items():
        print(f"  {name:<26}" + "".join(f"{value:9.0f}" for value in values))
    one, two = (child("worker", 3, processes=n) for n in (1, 2))
    results = {name: full[name] for name in ("reward_step_vs_trl", "reward_step_vs_plain", "limit_fraction")} | {
        "loss_vs_prefix_grouper": ratio(loss["prefix-grouper"], loss["ours"]) if "prefix-grouper" in loss else None,
        "score_vs_one_at_a_time": ratio(scores["a call per image and axis"], scores["ours"]),
        "score_vs_own_one_at_a_time": ratio(scores["ours, one at a time"], scores["ours"]),
        "sr_step_vs_full_trajectory": ratio(sr["full trajectory"], sr["window"]),
        "loss_memory_vs_plain": [round(ours / plain, 2) for ours, plain in memory.values()][0],
        "weak_scaling_2": round(statistics.median(one) / statistics.median(two), 2),
        "reward_step_vs_trl_k2": pair["reward_step_vs_trl"], "reward_step_vs_plain_k2": pair["reward_step_vs_plain"],
        "memory_mb": memory, "loss": loss, "reward_step": full, "reward_step_k2": pair, "scoring": scores,
        "sr_step": sr,
        "notes": {"reward_step_vs_trl": "trl is not installed",
                  "loss_vs_prefix_grouper": "prefix-grouper is not installed"},
        "cores": os.cpu_count(), "torch": torch.__version__, "seconds": round(time.time() - started)}
    print()
    for name, value in results.items():
        if not isinstance(value, (dict, list)):
            print(f"{name:<32}{value if value is not None else 'null: ' + results['notes'][name.removesuffix('_k2')]}")
    out = ROOT / "runs" / "bench" / "results.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(results, indent=2) + "\n")
    print(out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["memory"]:
        print([peak_mb(sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))])
    elif sys.argv[1:2] == ["worker"]:
        print(worker(int(sys.argv[2])))
    else:
        main()
