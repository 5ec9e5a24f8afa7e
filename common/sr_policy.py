"""
What bicubic up-sampling leaves out of a photograph, in units of LR's contrast: the latent space of the pixel policy.

Shapes: B images, C = s^2 channels of a pixel-unshuffled patch, h w size of LR, H W = s h, s w size of HR and SR.

Random and deterministic denoising steps for any diffusion or flow policy. Needs torch and nothing else.

A policy predicts the clean latent and the noise of a state x = a clean + b noise. The next state of every sampler is
normal: mean a' clean + c noise, standard deviation s; samplers differ in how they split b' into c and s. `eta` is how
random they are; with 0 all are the same ODE step, c = b'.

    ddim    DDIM arXiv 2010.02502 eq. 12 and 16; eta 1 is as random as the forward process
    sde     Flow-GRPO arXiv 2505.05470 eq. 9, eta is its a; DanceGRPO's is the same with another eta
    cps     coefficients-preserving sampling arXiv 2509.05952, eta is its noise level: c^2 + s^2 = b'^2

DDIM is written for a^2 + b^2 = 1 (diffusion), the flow SDE for a + b = 1 (flows). Dividing x by a number per level
turns one into the other, so each sampler works for both; cps is the same in either.

Shapes: B samples, C latent channels, h w size of the latent, T denoising steps, whose levels are 0 (noise) .. T.

The super-resolution policy: a diffusers UNet2DModel that draws the luma detail that bicubic leaves out.

The UNet works at the size of the LR image, s^2 times cheaper than in pixels. Its latent is the luma of HR -
bicubic(LR), pixel-unshuffled by the scale s to C = s^2 channels, divided by a power of LR's contrast (flat places have
little detail) and turned into the principal axes of the training patches, each of unit spread. So even an untrained
UNet draws detail of about the right size. Color stays bicubic's. The UNet also sees LR and predicts v; the schedule
ends at zero signal.

`step` .. `save_policy` take the policies of sr_latent.py and sr_flow.py, too. A policy has `unet` (the network that is
trained), `lora_part` (its name in a pipeline), `sampler` (sampler.json), `channels`, `multiple` (of which LR's sides
are multiples), `times` [T], `levels` [T + 1, 4] (samplers.py); and observe (what it is told of LR), predict (a state's
clean latent and noise), decode, write.

Shapes: B samples, C latent channels, h w size of the latent (here LR's), H W = s h, s w size of SR, T denoising steps,
W of them random. Any h, w that halve evenly on every level of the UNet will do.
Sources: v-prediction arXiv 2202.00512 appendix D; zero terminal SNR arXiv 2305.08891; denoising as a T-step decision
process (DDPO) arXiv 2305.13301. The latent is our own choice.
"""
import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from peft import PeftModel
from torch import Tensor, nn

from common import dist, grpo, run, sr_pipelines
from common.config import fail

LUMA = (0.299, 0.587, 0.114)        # ITU-R BT.601
CONTRAST_FLOOR = 2 / 255            # about the noise of an 8-bit JPEG
CONDITION_CHANNELS = 7              # of condition()


def luma(image: Tensor) -> Tensor:
    """[B, 3, h, w] -> [B, 1, h, w]."""
    return (image * image.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def upsample(lr: Tensor, scale: int) -> Tensor:
    """Bicubic [B, 3, h, w] -> [B, 3, H, W]; may overshoot 0..1."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)


def local_mean(image: Tensor) -> Tensor:
    """Mean of 3 x 3 px, same size."""
    return F.avg_pool2d(F.pad(image, (1, 1, 1, 1), mode="replicate"), 3, 1)


def contrast(lr: Tensor) -> Tensor:
    """Standard deviation of luma in 3 x 3 px of LR [B, 3, h, w], with a floor: [B, 1, h, w]."""
    y = luma(lr)
    return ((local_mean(y ** 2) - local_mean(y) ** 2).clamp(min=0) + CONTRAST_FLOOR ** 2).sqrt()


def detail_patches(hr: Tensor, lr: Tensor, power: float) -> Tensor:
    """Luma detail of HR [B, 3, H, W] in units of contrast(LR) ** power, pixel-unshuffled: [B, C, h, w]."""
    scale = hr.shape[-1] // lr.shape[-1]
    return F.pixel_unshuffle(luma(hr - upsample(lr, scale)), scale) / contrast(lr) ** power


def condition(lr: Tensor) -> Tensor:
    """[B, 7, h, w], what the UNet sees of LR [B, 3, h, w]: LR, its fine structure enlarged, its log contrast."""
    spread = contrast(lr)
    return torch.cat([2 * lr - 1, (lr - local_mean(lr)) / spread, spread.log() + 3], 1)


SAMPLERS = ("ddim", "sde", "cps")
SOLVERS = ("euler", "dpm")


@dataclass(frozen=True)
class Level:
    """Noise level of B states, each [B, 1, 1, 1]."""
    signal: Tensor                  # a
    noise: Tensor                   # b
    power: Tensor                   # a^2 / (a^2 + b^2), "alpha bar"
    sigma: Tensor                   # b / (a + b)


# schedules -----------------------------------------------------------------------------------------------

def variance_preserving(power: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a diffusion model with signal power [T + 1] ("alpha bar"), float32."""
    signal, noise = power.sqrt(), (1 - power).sqrt()
    return torch.stack([signal, noise, power, noise / (signal + noise)], 1)


def flow(sigma: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a flow model with noise levels sigma [T + 1], float32."""
    signal, noise = 1 - sigma, sigma
    return torch.stack([signal, noise, signal ** 2 / (signal ** 2 + noise ** 2), sigma], 1)


def at(levels: Tensor, index: Tensor) -> Level:
    """Levels of a schedule [T + 1, 4] at index [B] (0..T)."""
    return Level(*levels[index].T[..., None, None, None])


def window_start(step: int, first: int, *, width: int, steps: int, every: int, stride: int) -> int:
    """
    First random denoising step in GRPO step `step`; the window has `width` of `steps` denoising steps.

    Every `every` GRPO steps it moves by `stride` towards clean steps (MixGRPO arXiv 2507.21802); 0: it stays. It ends
    before the last step, which hardly adds noise: its density would be too narrow to learn from.
    """
    return min(first + (step // every * stride if every else 0), steps - 1 - width)


# steps ---------------------------------------------------------------------------------------------------

def clean_and_noise(predicts: str, x: Tensor, output: Tensor, now: Level) -> tuple[Tensor, Tensor]:
    """What a network's output says of state x at level `now`; all [B, C, h, w]."""
    a, b = now.signal, now.noise
    if predicts == "epsilon":
        return (x - b * output) / a, output
    if predicts == "v_prediction":                                  # v = a noise - b clean, arXiv 2202.00512 app. D
        return a * x - b * output, a * output + b * x
    assert predicts == "flow", f"predicts {predicts}"
    return x - b * output, x + a * output                           # v = noise - clean


def split(sampler: str, now: Level, after: Level, eta: float) -> tuple[Tensor, Tensor]:
    """Factor c of the predicted noise in the mean, and standard deviation s, of a step; each [B, 1, 1, 1]."""
    if eta == 0:
        return after.noise, torch.zeros_like(after.noise)
    if sampler == "cps":
        return after.noise * math.cos(eta * math.pi / 2), after.noise * math.sin(eta * math.pi / 2)
    if sampler == "ddim":
        std = eta * ((1 - after.power) / (1 - now.power) * (1 - now.power / after.power)).sqrt()        # eq. 16
        kept = (1 - after.power - std ** 2).clamp(min=0).sqrt()                                         # eq. 12
        size = after.signal / after.power.sqrt()                    # of x where a^2 + b^2 is 1; a diffusion's is 1
        return kept * size, std * size
    assert sampler == "sde", f"sampler={sampler}"
    level = torch.where(now.sigma < 1, now.sigma, after.sigma)      # 1 / (1 - sigma) is infinite at pure noise
    variance, length = eta ** 2 * now.sigma / (1 - level), now.sigma - after.sigma  # per unit of time; time
    size = after.signal + after.noise                               # of x where a + b is 1; a flow's is 1
    return (after.sigma - variance * length / (2 * now.sigma)) * size, (variance * length).sqrt() * size


def gaussian_step(sampler: str, clean: Tensor, noise: Tensor, *, now: Level, after: Level,
         eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation [B, 1, 1, 1] of a step from level `now` to `after`, float32."""
    kept, std = split(sampler, now, after, eta)
    return after.signal * clean + kept * noise, std


def second_order(clean: Tensor, last: Tensor, *, before: Level, now: Level, after: Level) -> Tensor:
    """
    What DPM-Solver++ (2M, midpoint; arXiv 2211.01095 alg. 2) adds to an ODE step from `now` to `after`.

    last: the clean latent that was predicted at the level `before`, one ODE step earlier. after.noise > 0.
    """
    ratios = [level.noise / level.signal for level in (before, now, after)]             # exp(-lambda); may be inf
    length, past = (ratios[1] / ratios[2]).log(), (ratios[0] / ratios[1]).log()         # h_i, h_{i-1}
    slope = (clean - last) * (length / (2 * past))
    return (after.signal - after.noise / ratios[1]) * slope


@dataclass(frozen=True)
class Sampler:
    """What sampling needs beside the weights; sampler.json in the policy's folder."""
    scale: int                      # s: SR is s times as wide and as high as LR
    steps: int                      # T
    betas: list[float]              # [N] noise schedule over the training time steps
    contrast_power: float           # detail is divided by contrast(LR) ** contrast_power
    basis: list[list[float]]        # [C, C] row c: the luma patch (pixel_unshuffle) of a unit of channel c
    times: list[int] = field(default_factory=list)      # [T] training time steps, falling; none: evenly spaced
    solver: str = "euler"           # of the ODE steps: euler or dpm


def timed(sampler: Sampler, steps: int, times: list[int] = ()) -> Sampler:
    """The same with other denoising steps: at these training time steps, or else evenly spaced from pure noise on."""
    count = len(sampler.betas)
    if not times and count % steps:
        fail(f"{steps} denoising steps: they should divide the {count} time steps that the policy was trained with")
    return replace(sampler, steps=steps, times=list(times or range(count - 1, -1, -(count // steps))))


@dataclass(frozen=True)
class Rollout:
    """Samples and the random steps that made them; the policy acts W times per sample."""
    seen: Tensor                    # [B, .., h, w] what the policy was told of LR: its observe()
    latents: Tensor                 # [B, W + 1, C, h, w] before the first random step ... after the last
    logp: Tensor                    # [B, W] log-density of each random step when sampled, mean over C h w
    clean: Tensor                   # [B, C, h, w] latent after the last step
    images: Tensor                  # [B, 3, H, W] SR in 0..1, its decode()
    start: int                      # index of the first random step
    eta: float                      # how random, see samplers.py
    sampler: str                    # a name in samplers.SAMPLERS
    decode_seconds: float           # what decode() took


class Policy(nn.Module):
    """UNet, schedule and latent space. `unet` may be wrapped by peft."""

    def __init__(self, unet: nn.Module, sampler: Sampler):
        super().__init__()
        self.unet, self.channels = unet, len(sampler.basis)
        self.lora_part = None                       # no pipeline, so none that could load LoRA by itself
        self.multiple = 2 ** (len(unet.config.block_out_channels) - 1)                  # of which h, w are multiples
        self.sampler = sampler if sampler.times else timed(sampler, sampler.steps)
        times = self.sampler.times
        assert len(times) == sampler.steps, f"{len(times)} time steps for {sampler.steps} denoising steps"
        signal = torch.cumprod(1 - torch.tensor(sampler.betas, dtype=torch.float64), 0)         # [N]
        ends = torch.cat([signal[times], signal.new_ones(1)])           # [T + 1] no noise after the last step
        basis = torch.tensor(sampler.basis, dtype=torch.float64)                                # [C, C]
        constants = {"times": torch.tensor(times), "levels": variance_preserving(ends.float()),
                     "signal": signal.float(), "basis": basis.float(), "inverse": torch.linalg.inv(basis).float()}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    def observe(self, lr: Tensor, keys: list[tuple]) -> Tensor:
        """What predict and decode are told of LR [B, 3, h, w] in 0..1: LR itself. A key per row, as in draw_noise."""
        return lr

    def encode(self, hr: Tensor, lr: Tensor) -> Tensor:
        """HR [B, 3, H, W] and LR [B, 3, h, w] in 0..1 -> clean latent [B, C, h, w] of about unit spread."""
        return torch.einsum("bphw,pc->bchw", detail_patches(hr, lr, self.sampler.contrast_power), self.inverse)

    def decode(self, latent: Tensor, lr: Tensor) -> Tensor:
        """Clean latent [B, C, h, w] and LR [B, 3, h, w] -> SR [B, 3, H, W] in 0..1."""
        detail = torch.einsum("bchw,cp->bphw", latent, self.basis)
        detail = F.pixel_shuffle(detail * contrast(lr) ** self.sampler.contrast_power, self.sampler.scale)
        return (upsample(lr, self.sampler.scale) + detail).clamp(0, 1)

    def velocity(self, x: Tensor, time: Tensor, lr: Tensor) -> Tensor:
        """Predicted v [B, C, h, w], float32, for a noisy latent x [B, C, h, w] at training time steps [B]."""
        return self.unet(torch.cat([x, condition(lr)], 1), time).sample.float()

    def predict(self, x: Tensor, index: Tensor, lr: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise, float32, in state x [B, C, h, w] before denoising step `index` [B] (0..T-1)."""
        v = self.velocity(x, self.times[index], lr)
        return clean_and_noise("v_prediction", x, v, at(self.levels, index))

    def write(self, folder: Path) -> None:
        """A folder that UNet2DModel.from_pretrained loads, sampler.json last."""
        self.unet.save_pretrained(folder)
        run.write_json(folder / "sampler.json", asdict(self.sampler))


# sampling ------------------------------------------------------------------------------------------------

def draw_noise(keys: list[tuple], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal [B, *shape]; row b depends on keys[b] = (seed, ...), not on batch, rank or device."""
    return torch.stack([torch.randn(shape, generator=run.generator(*key)) for key in keys]).to(device)


def step(policy: Policy, x: Tensor, index: Tensor, seen: Tensor, *, eta: float = 0.0,
         sampler: str = "ddim") -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and std [B, 1, 1, 1] of denoising step `index` [B] (0..T-1) from x, float32; eta 0: an ODE."""
    now, after = (at(policy.levels, i) for i in (index, index + 1))
    return gaussian_step(sampler, *policy.predict(x, index, seen), now=now, after=after, eta=eta)


@torch.no_grad()
def sample(policy: Policy, seen: Tensor, noise: Tensor, *, start: int = 0, eta: float = 1.0,
           sampler: str = "ddim") -> Rollout:
    """
    Draw SR for what the policy was told of LR from noise [B, 1 + W, C, h, w]: first latent, then one per random step.

    Steps start .. start + W - 1 are random, the others are ODE steps: those before by Euler, those after by the
    policy's solver, whose memory begins there.
    """
    width, last = noise.shape[1] - 1, policy.sampler.steps - 1
    assert start + width <= last, f"random steps end before step {last}: it adds no noise and has no density"
    x, latents, logp, past = noise[:, 0], [], [], None
    for i in range(last + 1):
        index = torch.full((len(seen),), i, device=seen.device)
        now, after = (at(policy.levels, j) for j in (index, index + 1))
        clean, error = policy.predict(x, index, seen)
        inside = start <= i < start + width
        mean, std = gaussian_step(sampler, clean, error, now=now, after=after, eta=eta if inside else 0.0)
        if inside:
            latents += [] if latents else [x]
            x = mean + std * noise[:, 1 + i - start]
            latents.append(x)
            logp.append(grpo.gaussian_logp(x, mean, std))
        else:
            x = mean
        if policy.sampler.solver == "dpm" and i >= start + width:
            if past and i < last:
                x = x + second_order(clean, past[0], before=past[1], now=now, after=after)
            past = clean, now
    latents = torch.stack(latents, 1) if width else noise[:, :0]
    logp = torch.stack(logp, 1) if width else noise.new_zeros(len(seen), 0)
    started = dist.clock(x.device)
    images = policy.decode(x, seen)
    return Rollout(seen, latents, logp, x, images, start, eta, sampler, dist.clock(x.device) - started)


def restore(policy: Policy, seen: Tensor, noise: Tensor) -> Tensor:
    """Deterministic SR [B, 3, H, W] in 0..1 for what the policy was told of LR and the first latent [B, C, h, w]."""
    return sample(policy, seen, noise[:, None]).images


def replay(policy: Policy, rollout: Rollout) -> tuple[Tensor, Tensor]:
    """Mean [B * W, C, h, w], std [B * W, 1, 1, 1] of a rollout's random steps under policy, with gradient."""
    count, width = rollout.logp.shape
    index = torch.arange(rollout.start, rollout.start + width, device=rollout.seen.device).repeat(count)
    seen = rollout.seen.repeat_interleave(width, 0)
    return step(policy, rollout.latents[:, :-1].flatten(0, 1), index, seen, eta=rollout.eta, sampler=rollout.sampler)


def log_prob(rollout: Rollout, mean: Tensor, std: Tensor) -> Tensor:
    """[B, W] log-density of the rollout's random steps under the mean and std of replay()."""
    return grpo.gaussian_logp(rollout.latents[:, 1:].flatten(0, 1), mean, std).view_as(rollout.logp)


# model and disk ------------------------------------------------------------------------------------------

def adapter_off(policy: Policy) -> AbstractContextManager:
    """Context in which a policy with LoRA is its own reference; one without has nothing to switch off."""
    return policy.unet.disable_adapter() if isinstance(policy.unet, PeftModel) else nullcontext()


def save_policy(policy: Policy, folder: Path) -> None:
    """Merge LoRA into the weights, here too, and write the folder that load_policy reads; LoRA by itself beside it."""
    if isinstance(policy.unet, PeftModel):
        if policy.lora_part:
            sr_pipelines.save_lora(policy.unet, policy.lora_part, folder)
        policy.unet = policy.unet.merge_and_unload()
    policy.write(folder)


def load_policy(folder: Path, device: torch.device, steps: int | None = None) -> Policy:
    """The frozen policy that save_policy wrote, or one line that says what is wrong with it; steps: another T."""
    sampler = sr_pipelines.read_sampler(Sampler, folder)
    sampler = sampler if steps in (None, sampler.steps) else timed(sampler, steps)
    try:
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
        return Policy(unet, sampler).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, NotImplementedError) as error:      # the last one: weights are missing
        fail(f"{folder}: the policy cannot be loaded ({error}); run the stage that wrote it again")
