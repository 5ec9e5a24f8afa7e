"""report.html and table.md of stage 05: the policy before and after GRPO, for a person who was not there."""
from pathlib import Path

from common import report, run, sr_statistics

COMPARED = ("reward", "heldout", "psnr", "ssim", "lr_psnr")         # in manifest.json, before and after
LIMITS = """<h2>What this does not show</h2><p>The labels are a proxy computed from the ground truth, not
people's votes. The intervals are over test images; these come from few photographs, so they say how sure the
result is for such photographs, not for all.</p>"""


def signed(change: dict) -> str:
    """+gain [interval] of sr_statistics.change."""
    ends = " [{:+.3f}, {:+.3f}]".format(*change["ci95"]) if change["ci95"] else ""
    return f"{change['gain']:+.3f}{ends}"


def table_rows(results: dict, names: dict[str, tuple]) -> list[list[str]]:
    """Head, a row for each variant, and tuned minus base with its interval; names: METRICS."""
    rows = [[variant, *(f"{mean[name]:.3f}" for name in names)] for variant, mean in results["mean"].items()]
    gain = [signed({"gain": results["gain"][name], "ci95": results["gain_ci95"][name]}) for name in names]
    rows.append(["tuned - base", *gain])
    if "hybrid_gain" in results:
        rows.append(["hybrid - base", *(signed(results["hybrid_gain"][name]) for name in names)])
    return [["", *(name for name, _ in names.values())], *rows]


def step_rows(results: dict, names: dict[str, tuple]) -> list[list[str]]:
    """Head, and base and the gain of the others at every number of denoising steps."""
    rows = []
    for steps, found in results["steps"].items():
        rows.append([f"{steps} steps: base", *(f"{found['mean']['base'][name]:.3f}" for name in COMPARED)])
        rows += [[f"{steps} steps: {variant} - base", *(signed(gain[name]) for name in COMPARED)]
                 for variant, gain in found["gain"].items()]
    return [["", *(names[name][0] for name in COMPARED)], *rows]


def strength_rows(results: dict, names: dict[str, tuple]) -> list[list[str]]:
    """Head, and base and the gain of the others in each tercile of degradation strength."""
    rows = []
    for found in results["by_strength"]:
        label = "{} ({:.1f} to {:.1f} dB, {} images)".format(found["strength"], *found["lr_psnr_of_hr"],
                                                             found["images"])
        rows.append([f"{label}: base", *(f"{found['mean']['base'][name]:.3f}" for name in COMPARED)])
        rows += [[f"{variant} - base", *(signed(gain[name]) for name in COMPARED)]
                 for variant, gain in found["gain"].items()]
    return [["", *(names[name][0] for name in COMPARED)], *rows]


def markdown(results: dict, names: dict[str, tuple]) -> str:
    """table.md: the main table, then those of step counts, if any, and degradation strength."""
    tables = [table_rows(results, names), strength_rows(results, names)]
    tables += [step_rows(results, names)] if results["steps"] else []
    return "\n".join("".join(f"| {' | '.join(cells)} |\n" for cells in (head, ["---"] * len(head), *body))
                     for head, *body in tables)


def headline_parts(results: dict, large: dict[str, dict], names: dict[str, tuple]) -> list[str]:
    """The top of the report: what it is about, the slider, four numbers, the table."""
    head, interval = results["headline"], "95 % interval of the gain [{:+.3f}, {:+.3f}]".format
    parts = [f"<p>A diffusion policy for super-resolution before and after GRPO on the score of a reward model "
             f"that sees the low-resolution (LR) image. {results['images']} test images, cut from photographs that "
             f"no stage was trained on; {results['seeds_per_image']} samples each, with the same noise.</p>"]
    for caption, images in list(large.items())[:1]:
        parts.append(f"<figure>{report.compare(images['base'], images['tuned'])}<figcaption>Drag: before "
                     f"GRPO on the left, after GRPO on the right. {caption}.</figcaption></figure>")
    from_to = {name: (head[f"{name}_base"], head[f"{name}_tuned"]) for name in COMPARED}
    return parts + [
        report.cards([
            ("reward", "{:.2f} \u2192 {:.2f}".format(*from_to["reward"]),
             interval(*head["reward_gain_ci95"])),
            ("tuned sample preferred", f"{head['win_rate']:.0%}", "by the judge, same image and noise"),
            ("held-out judge", "{:.3f} \u2192 {:.3f}".format(*from_to["heldout"]),
             interval(*head["heldout_gain_ci95"])),
            ("LR-PSNR", "{:.1f} \u2192 {:.1f} dB".format(*from_to["lr_psnr"]),
             interval(*results["gain_ci95"]["lr_psnr"]))]),
        "<h2>Measured</h2>", report.table(table_rows(results, names), "tuned"), "<ul>",
        *(f"<li><b>{name}</b>: {meaning}.</li>" for name, meaning in names.values()), "</ul>"]


def detail_parts(results: dict, names: dict[str, tuple], variants: list[str]) -> list[str]:
    """Seeds, degradation strength, numbers of steps, cost."""
    titles, cost = {name: names[name][0] for name in sr_statistics.DRAWN}, results["seconds_per_sample"]
    parts = [
        "<h2>Luck of the seed</h2><p>Of m samples of one image the best, the mean and the worst, by each measure on "
        "its own. A worst sample that rises means less depends on luck; all three rising means better samples.</p>",
        f'<div class="plot">{report.png_tag(sr_statistics.plot_draws(results["draws"], titles, variants), "seeds")}'
        "</div>",
        "<h2>By strength of the degradation</h2><p>Thirds of the test images by the LR-PSNR of their ground truth: "
        "how far LR is from the plainly down-sampled photograph. Low: strongly degraded.</p>",
        report.table(strength_rows(results, names))]
    if results["steps"]:
        parts += ["<h2>With other numbers of denoising steps</h2><p>The policy was tuned at "
                  f"{results['denoise_steps']} steps.</p>", report.table(step_rows(results, names))]
    return parts + [
        "<h2>Where the time goes</h2>",
        report.table([["seconds per sample of the tuned policy", *cost], ["", *(f"{one:.4f}" for one in
                                                                                cost.values())]])]


def picture_parts(rows: list[tuple], large: dict[str, dict]) -> list[str]:
    """Test images as (caption, images, line below each), and larger crops as caption -> images."""
    parts = ["<h2>Test images</h2><p>Not picked by eye: evenly spaced by gain, from the smallest on.</p>"]
    parts += [f"<figure>{report.row(images, below)}<figcaption>{caption}</figcaption></figure>"
              for caption, images, below in rows]
    if large:
        parts.append("<h2>Larger crops</h2><p>The same weights, on larger images than those that the "
                     "policy was trained on.</p>")
    return parts + [f"<figure>{report.row(images, {})}<figcaption>{caption}</figcaption></figure>"
                    for caption, images in large.items()]


def write(folder: Path, results: dict, *, names: dict[str, tuple], variants: list[str], rows: list[tuple],
          large: dict[str, dict]) -> None:
    """report.html: everything is inside, it opens from disk. variants: the policies; rows, large: see picture_parts."""
    parts = headline_parts(results, large, names) + picture_parts(rows, large) + detail_parts(results, names, variants)
    parts += [
        "<h2>How the policy was tuned (stage 04)</h2><p>Validation images with fixed noise. The reward is to "
        "rise, LR-PSNR and the held-out judge not to fall, the KL to the policy before GRPO to stay small.</p>",
        report.curves(folder.parent / "04_train_sr_grpo" / "metrics.jsonl", {
            "val_reward": "validation reward", "val_lr_psnr": "validation LR-PSNR, dB",
            "val_heldout": "validation, held-out judge", "ref_kl": "KL to the policy before"}),
        "<h2>How the reward model was trained (stage 02)</h2><p>Pair accuracy: how often it orders two "
        "candidates of one LR image as the labels do; 0.5 is chance.</p>",
        report.curves(folder.parent / "02_train_reward" / "metrics.jsonl", {
            "val_pair_accuracy": "validation pair accuracy", "reward_mean": "mean GRPO reward"})]
    judged = folder.parent / "03_eval_reward" / "table.md"
    if judged.exists():
        parts += ["<h2>How good the reward model is (stage 03)</h2>",
                  report.from_markdown(judged.read_text(encoding="utf-8"))]
    page = report.page("Super-resolution before and after GRPO", [*parts, LIMITS])
    run.write_bytes(folder / "report.html", page.encode())
