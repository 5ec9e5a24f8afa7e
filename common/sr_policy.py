"""
Super-resolution policies: the steps of any diffusion or flow model, sampling and replaying them, and the small policy.

**Steps.** A policy predicts the clean latent and the noise of a state x = a clean + b noise. The next state of every
sampler is normal: mean a' clean + c noise, standard deviation s; samplers differ in how they split b' into c and s.
`eta` is how random they are; with 0 all are the same ODE step, c = b'.

    ddim    DDIM arXiv 2010.02502 eq. 12 and 16; eta 1 is as random as the forward process
    sde     Flow-GRPO arXiv 2505.05470 eq. 9, eta is its a; DanceGRPO's is the same with another eta
    cps     coefficients-preserving sampling arXiv 2509.05952, eta is its noise level: c^2 + s^2 = b'^2

DDIM is written for a^2 + b^2 = 1 (diffusion), the flow SDE for a + b = 1 (flows). Dividing x by a number per level
turns one into the other, so each sampler works for both; cps is the same in either.

**The small policy** is a regressor and a diffusion model of the luma detail that the regressor leaves out:

    SR = R(LR) + gain sigma pixel_shuffle(z)                                        before GRPO
    SR = R(LR) + a (R(LR) - box blur of R(LR)) + gain sigma pixel_shuffle(z)        with a sharpening map a

R is a small residual network over bicubic. z is what a diffusers UNet2DModel draws: luma of HR - R(LR),
pixel-unshuffled by the scale s to C = s^2 channels and divided by one number, sigma, so that unpredictable fine detail
keeps its small share of the loss. The UNet works at the size of LR, s^2 times cheaper than in pixels, sees LR and
R(LR), and predicts v; the schedule ends at zero signal. A gain below 1 adds less of it. Color is the regressor's.
The sharpening map says how much to sharpen where. A small network chooses it from LR before the first denoising step;
in a rollout it is drawn from a normal distribution around that choice, and so is the first action of the sample. Stage
04 adds the network; untrained it chooses 0, which changes nothing.

**Any policy** (see sr_pipelines.py for published ones) is a module with `unet` (the network that is trained), `kind`,
`map` (that of the sharpening map, or None), `sampler` (what sampler.json holds), `channels`, `multiple` (of which LR's
sides are multiples), `lora_layers`, `times` [T] and `levels` [T + 1, 4]; and observe (what it sees of LR), predict (a
state's clean latent and noise), decode, save.

Shapes: B samples, C latent channels, h w size of the latent (the small policy's: LR's), H W size of SR, T denoising
steps, W of them random; levels are 0 (noise) .. T (clean).
Sources: v-prediction arXiv 2202.00512 appendix D; zero terminal SNR arXiv 2305.08891; denoising as a T-step decision
process (DDPO) arXiv 2305.13301; diffusion of a regressor's residual (SRDiff) arXiv 2104.14951.
"""
import math
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from torch import Tensor, nn

from common import grpo, run
from common.config import fail
from common.images import LUMA
from common.training import merged

SAMPLERS = ("ddim", "sde", "cps")
CONTRAST_FLOOR = 2 / 255            # about the noise of an 8-bit JPEG
CONDITION_CHANNELS = 7              # of condition()
REGRESSOR, MAP = "regressor.safetensors", "map.safetensors"
MAP_CELL = 4                        # LR px: side of a cell of the sharpening map
MAP_WIDTH = 32                      # channels of its network: 11,329 weights
MAP_STD = 0.4                       # standard deviation of a drawn map around the choice
MAP_BOX = 5                         # SR px: sharpening adds what a box blur of this side takes away
TRAIN_STEPS = 1000                  # time steps of the small policy's noise schedule


# steps -----------------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Level:
    """Noise level of B states, each [B, 1, 1, 1]."""
    signal: Tensor                  # a
    noise: Tensor                   # b
    power: Tensor                   # a^2 / (a^2 + b^2), "alpha bar"
    sigma: Tensor                   # b / (a + b)


def diffusion_levels(power: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a diffusion model with signal power [T + 1] ("alpha bar"), float32."""
    signal, noise = power.sqrt(), (1 - power).sqrt()
    return torch.stack([signal, noise, power, noise / (signal + noise)], 1)


def flow_levels(sigma: Tensor) -> Tensor:
    """Levels [T + 1, 4] of a flow model with noise levels sigma [T + 1], float32."""
    signal, noise = 1 - sigma, sigma
    return torch.stack([signal, noise, signal ** 2 / (signal ** 2 + noise ** 2), sigma], 1)


def at(levels: Tensor, index: Tensor) -> Level:
    """Levels of a schedule [T + 1, 4] at index [B] (0..T)."""
    return Level(*levels[index].T[..., None, None, None])


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
        factor = (1 - after.power - std ** 2).clamp(min=0).sqrt()                                       # eq. 12
        size = after.signal / after.power.sqrt()                    # of x where a^2 + b^2 is 1; a diffusion's is 1
        return factor * size, std * size
    assert sampler == "sde", f"sampler={sampler}"
    level = torch.where(now.sigma < 1, now.sigma, after.sigma)      # 1 / (1 - sigma) is infinite at pure noise
    variance, length = eta ** 2 * now.sigma / (1 - level), now.sigma - after.sigma  # per unit of time; time
    size = after.signal + after.noise                               # of x where a + b is 1; a flow's is 1
    return (after.sigma - variance * length / (2 * now.sigma)) * size, (variance * length).sqrt() * size


def gaussian_step(sampler: str, clean: Tensor, noise: Tensor, *, now: Level, after: Level,
                  eta: float) -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and standard deviation [B, 1, 1, 1] of a step from level `now` to `after`, float32."""
    factor, std = split(sampler, now, after, eta)
    return after.signal * clean + factor * noise, std


def step(policy: "Policy", x: Tensor, index: Tensor, seen: Tensor, *, eta: float = 0.0,
         sampler: str = "ddim") -> tuple[Tensor, Tensor]:
    """Mean [B, C, h, w] and std [B, 1, 1, 1] of denoising step `index` [B] (0..T-1) from x, float32; eta 0: an ODE."""
    now, after = at(policy.levels, index), at(policy.levels, index + 1)
    return gaussian_step(sampler, *policy.predict(x, index, seen), now=now, after=after, eta=eta)


# sample and replay -----------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Rollout:
    """Samples and what made them. The A actions of a sample: its sharpening map, if there is one, and W steps."""
    seen: Tensor                    # [B, .., h, w] what the policy sees of LR: its observe()
    latents: Tensor                 # [B, W + 1, C, h, w] before the first random step ... after the last
    logp: Tensor                    # [B, A] log-density of each action when sampled, mean over its elements
    images: Tensor                  # [B, 3, H, W] SR in 0..1
    start: int                      # index of the first random step
    eta: float                      # how random
    sampler: str                    # one of SAMPLERS
    map: Tensor | None              # [B, 1, h / 4, w / 4] sharpening map that was drawn; a policy without one: None


def draw_noise(keys: list[tuple], shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Standard normal [B, *shape]; row b depends on keys[b] = (seed, ...), not on batch, rank or device."""
    return torch.stack([torch.randn(shape, generator=run.generator(*key)) for key in keys]).to(device)


@torch.no_grad()
def sample(policy: "Policy", seen: Tensor, noise: Tensor, *, map_noise: Tensor | None = None, start: int = 0,
           eta: float = 1.0, sampler: str = "ddim") -> Rollout:
    """
    Draw SR for what the policy sees of LR, from noise [B, 1 + W, C, h, w]: the first latent, then one per random step.

    Steps start .. start + W - 1 are random, the others are ODE steps. map_noise: standard normal, of the sharpening
    map's shape; None: the policy has no map, or the map is the one that it chooses.
    """
    width, steps = noise.shape[1] - 1, policy.sampler.steps
    assert start + width < steps, f"random steps end before step {steps - 1}: it adds no noise and has no density"
    drawn, logp = None, []
    if map_noise is not None:
        choice = policy.map(seen)
        drawn = choice + MAP_STD * map_noise
        logp.append(grpo.gaussian_logp(drawn, choice, MAP_STD))
    x, latents = noise[:, 0], []
    for i in range(steps):
        index = torch.full((len(seen),), i, device=seen.device)
        if start <= i < start + width:
            mean, std = step(policy, x, index, seen, eta=eta, sampler=sampler)
            latents.append(x)
            x = mean + std * noise[:, 1 + i - start]
            logp.append(grpo.gaussian_logp(x, mean, std))
            last = x
        else:
            x, _ = step(policy, x, index, seen)
    latents = torch.stack([*latents, last], 1) if width else noise[:, :0]
    logp = torch.stack(logp, 1) if logp else noise.new_zeros(len(seen), 0)
    image = policy.decode(x, seen) if drawn is None else policy.decode(x, seen, drawn)     # only ours knows maps
    return Rollout(seen, latents, logp, image, start, eta, sampler, drawn)


def restore(policy: "Policy", seen: Tensor, noise: Tensor) -> Tensor:
    """Deterministic SR [B, 3, H, W] in 0..1 for what the policy sees of LR and the first latent [B, C, h, w]."""
    return sample(policy, seen, noise[:, None]).images


class Actions(NamedTuple):
    """N draws from normal distributions."""
    drawn: Tensor                   # [N, ...]
    mean: Tensor                    # [N, ...] under the policy that is asked, with gradient
    std: Tensor                     # [N, 1, 1, 1]


def replay(policy: "Policy", rollout: Rollout) -> list[Actions]:
    """A rollout's actions under policy: the B sharpening maps, if there are any, and the B * W random steps."""
    seen, (count, width) = rollout.seen, (len(rollout.seen), rollout.latents.shape[1] - 1)
    index = torch.arange(rollout.start, rollout.start + width, device=seen.device).repeat(count)
    mean, std = step(policy, rollout.latents[:, :-1].flatten(0, 1), index, seen.repeat_interleave(width, 0),
                     eta=rollout.eta, sampler=rollout.sampler)
    steps = Actions(rollout.latents[:, 1:].flatten(0, 1), mean, std)
    if rollout.map is None:
        return [steps]
    return [Actions(rollout.map, policy.map(seen), std.new_full((count, 1, 1, 1), MAP_STD)), steps]


def log_prob(rollout: Rollout, actions: list[Actions]) -> Tensor:
    """[B, A] log-density of the rollout's actions, as replay() gave them."""
    return torch.cat([grpo.gaussian_logp(*kind).view(len(rollout.seen), -1) for kind in actions], 1)


# the small policy: what its networks see --------------------------------------------------------------------------

def gray(image: Tensor) -> Tensor:
    """Luma of [B, 3, h, w]: [B, 1, h, w]."""
    return (image * image.new_tensor(LUMA)[:, None, None]).sum(1, keepdim=True)


def upsample(lr: Tensor, scale: int) -> Tensor:
    """Bicubic [B, 3, h, w] -> [B, 3, H, W]; may overshoot 0..1."""
    return F.interpolate(lr, scale_factor=scale, mode="bicubic", align_corners=False)


def local_mean(image: Tensor, side: int = 3) -> Tensor:
    """Mean of side x side px, same size; side is odd."""
    return F.avg_pool2d(F.pad(image, (side // 2,) * 4, mode="replicate"), side, 1)


def sharpen(image: Tensor, amount: Tensor | float) -> Tensor:
    """Unsharp mask of [B, 3, H, W]; amount: [B, 1, H, W] or one number."""
    return image + amount * (image - local_mean(image, MAP_BOX))


def contrast(lr: Tensor) -> Tensor:
    """Standard deviation of luma in 3 x 3 px of LR [B, 3, h, w], with a floor: [B, 1, h, w]."""
    y = gray(lr)
    return ((local_mean(y ** 2) - local_mean(y) ** 2).clamp(min=0) + CONTRAST_FLOOR ** 2).sqrt()


def condition(lr: Tensor) -> Tensor:
    """[B, 7, h, w], what both networks see of LR [B, 3, h, w]: LR, its fine structure enlarged, its log contrast."""
    spread = contrast(lr)
    return torch.cat([2 * lr - 1, (lr - local_mean(lr)) / spread, spread.log() + 3], 1)


# the small policy: networks and disk ------------------------------------------------------------------------------

class Block(nn.Module):
    """Two convolutions and a shortcut, [B, width, h, w]."""

    def __init__(self, width: int):
        super().__init__()
        self.first, self.second = (nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.second(F.silu(self.first(x)))


class Regressor(nn.Module):
    """LR [B, 3, h, w] in 0..1 -> [B, 3, H, W]; before training it is bicubic."""

    def __init__(self, scale: int, width: int, blocks: int):
        super().__init__()
        self.scale = scale
        self.first = nn.Conv2d(CONDITION_CHANNELS, width, 3, padding=1)
        self.blocks = nn.Sequential(*(Block(width) for _ in range(blocks)))
        self.last = nn.Conv2d(width, 3 * scale ** 2, 3, padding=1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, lr: Tensor) -> Tensor:
        detail = self.last(self.blocks(self.first(condition(lr))))                          # [B, 3 s^2, h, w]
        return upsample(lr, self.scale) + F.pixel_shuffle(detail, self.scale)


class SharpeningMap(nn.Module):
    """What observe() gave [B, .., h, w] -> sharpening map [B, 1, h / 4, w / 4], rounded up; before training 0."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(CONDITION_CHANNELS, MAP_WIDTH, 3, padding=1)
        self.second = nn.Conv2d(MAP_WIDTH, MAP_WIDTH, 3, padding=1)
        self.last = nn.Conv2d(MAP_WIDTH, 1, 1)
        for p in self.last.parameters():
            nn.init.zeros_(p)

    def forward(self, seen: Tensor) -> Tensor:
        inside = F.silu(self.first(condition(seen[:, :3])))
        inside = F.avg_pool2d(inside, MAP_CELL, ceil_mode=True)
        return self.last(F.silu(self.second(inside)))


@dataclass(frozen=True)
class Sampler:
    """What sampling needs beside the weights: sampler.json in the policy's folder."""
    scale: int                      # s: SR is s times as wide and as high as LR
    steps: int                      # T, divides the number of training time steps
    betas: list[float]              # [N] noise schedule over the training time steps
    sigma: float                    # standard deviation of luma(HR - R(LR)) over the training crops
    gain: float                     # share of the drawn detail that is added to R(LR)
    width: int                      # of the regressor
    blocks: int                     # of the regressor
    map: bool = False               # whether there is a sharpening map


class Policy(nn.Module):
    """The small policy: UNet, regressor, schedule, perhaps a sharpening map. `unet` may be wrapped by peft."""
    kind, multiple = "pixel", 1     # LR may have any size: velocity() pads
    # convolutions, time embedding; conv_out has a large gradient, nearly all noise
    lora_layers = ["conv1", "conv2", "time_emb_proj", "linear_1", "linear_2"]

    def __init__(self, unet: nn.Module, regressor: Regressor, sampler: Sampler, map: SharpeningMap | None = None):
        super().__init__()
        count = len(sampler.betas)
        if count % sampler.steps:
            fail(f"{sampler.steps} denoising steps: they should divide the {count} time steps that the policy was "
                 "trained with")
        self.unet, self.regressor, self.map = unet, regressor, map
        self.sampler, self.channels = sampler, sampler.scale ** 2
        self.unit = 2 ** (len(unet.config.block_out_channels) - 1)      # sides of the UNet's input: multiples of it
        times = list(range(count - 1, -1, -(count // sampler.steps)))   # [T] evenly spaced from pure noise on
        signal = torch.cumprod(1 - torch.tensor(sampler.betas, dtype=torch.float64), 0)         # [N]
        ends = torch.cat([signal[times], signal.new_ones(1)])           # [T + 1] no noise after the last step
        constants = {"times": torch.tensor(times), "levels": diffusion_levels(ends.float()), "signal": signal.float()}
        for name, value in constants.items():
            self.register_buffer(name, value, persistent=False)

    @torch.no_grad()
    def observe(self, lr: Tensor, keys: list[tuple] = ()) -> Tensor:
        """LR [B, 3, h, w] in 0..1 and R(LR), pixel-unshuffled, [B, 3 + 3 s^2, h, w]; keys are not needed here."""
        return torch.cat([lr, F.pixel_unshuffle(self.regressor(lr), self.sampler.scale)], 1)

    def mean(self, seen: Tensor) -> Tensor:
        """R(LR) [B, 3, H, W] in what observe() gave."""
        return F.pixel_shuffle(seen[:, 3:], self.sampler.scale)

    def encode(self, hr: Tensor, seen: Tensor) -> Tensor:
        """HR [B, 3, H, W] in 0..1 -> clean latent [B, C, h, w], of unit spread over the training crops."""
        return F.pixel_unshuffle(gray(hr - self.mean(seen)), self.sampler.scale) / self.sampler.sigma

    def decode(self, latent: Tensor, seen: Tensor, sharpening: Tensor | None = None) -> Tensor:
        """Clean latent [B, C, h, w] -> SR [B, 3, H, W] in 0..1; sharpening: the map; None: the one chosen, if any."""
        mean, detail = self.mean(seen), F.pixel_shuffle(latent, self.sampler.scale)
        if self.map is not None:
            chosen = self.map(seen) if sharpening is None else sharpening
            chosen = F.interpolate(chosen, scale_factor=MAP_CELL * self.sampler.scale, mode="bilinear")
            mean = sharpen(mean, chosen[..., :mean.shape[-2], :mean.shape[-1]])
        return (mean + detail * (self.sampler.gain * self.sampler.sigma)).clamp(0, 1)

    def velocity(self, x: Tensor, time: Tensor, seen: Tensor) -> Tensor:
        """Predicted v [B, C, h, w], float32, for a noisy latent x [B, C, h, w] at training time steps [B]."""
        lr, (height, width) = seen[:, :3], x.shape[-2:]
        detail = F.pixel_unshuffle(gray(self.mean(seen)), self.sampler.scale) - gray(lr)        # that R(LR) adds
        inputs = torch.cat([x, condition(lr), detail / self.sampler.sigma], 1)
        inputs = F.pad(inputs, (0, -width % self.unit, 0, -height % self.unit), mode="replicate")
        return self.unet(inputs, time).sample.float()[..., :height, :width]

    def predict(self, x: Tensor, index: Tensor, seen: Tensor) -> tuple[Tensor, Tensor]:
        """Clean latent and noise, float32, in state x [B, C, h, w] before denoising step `index` [B] (0..T-1)."""
        v = self.velocity(x, self.times[index], seen)
        return clean_and_noise("v_prediction", x, v, at(self.levels, index))

    def save(self, folder: Path) -> None:
        """Merge LoRA into the UNet and write a folder that UNet2DModel.from_pretrained loads, sampler.json last."""
        self.unet = merged(self.unet)
        self.unet.save_pretrained(folder)
        run.save_tensors(folder / REGRESSOR, self.regressor.state_dict())
        if self.map is not None:
            run.save_tensors(folder / MAP, self.map.state_dict())
        run.write_json(folder / "sampler.json", asdict(replace(self.sampler, map=self.map is not None)))


def new_unet(channels: list[int], *, scale: int, side: int) -> UNet2DModel:
    """An untrained UNet that predicts v = 0, which is right where nothing can be known; no attention: any size."""
    latent, levels = scale ** 2, len(channels)
    unet = UNet2DModel(sample_size=side, in_channels=2 * latent + CONDITION_CHANNELS, out_channels=latent,
                       block_out_channels=channels, layers_per_block=1, norm_num_groups=8,
                       down_block_types=("DownBlock2D",) * levels, up_block_types=("UpBlock2D",) * levels,
                       add_attention=False)
    for p in unet.conv_out.parameters():
        nn.init.zeros_(p)
    return unet


def zero_terminal_betas() -> list[float]:
    """[N] cosine schedule that ends at zero signal."""
    signal = [math.cos(math.pi / 2 * i / TRAIN_STEPS) ** 2 for i in range(TRAIN_STEPS)] + [0.0]
    return [1 - after / before for before, after in zip(signal[:-1], signal[1:])]


def with_sampling(policy: Policy, *, steps: int, gain: float) -> Policy:
    """The same networks, shared, under another number of denoising steps and another gain."""
    other = Policy(policy.unet, policy.regressor, replace(policy.sampler, steps=steps, gain=gain), policy.map)
    return other.to(policy.signal.device).train(policy.training)


def read_sampler(kind: type, folder: Path):
    """The dataclass `kind` from the folder's sampler.json, or one line that says what is wrong with it."""
    saved, wanted = run.read_json(folder / "sampler.json"), [one.name for one in fields(kind)]
    if lacking := [name for name in wanted if name not in saved]:
        fail(f"{folder / 'sampler.json'}: lacks {', '.join(lacking)}: written by another version of this code? Run "
             "the stage that wrote it in a new run=")
    return kind(**{name: saved[name] for name in wanted})


def load_small(folder: Path, device: torch.device) -> Policy:
    """The frozen policy that Policy.save wrote, or one line that says what is wrong with it."""
    sampler = read_sampler(Sampler, folder)
    regressor, weights = Regressor(sampler.scale, sampler.width, sampler.blocks), run.load_tensors(folder / REGRESSOR)
    sharpening = SharpeningMap() if sampler.map else None
    try:
        regressor.load_state_dict(weights)
        if sharpening is not None:
            sharpening.load_state_dict(run.load_tensors(folder / MAP))
        unet = UNet2DModel.from_pretrained(folder, use_safetensors=True)
        return Policy(unet, regressor, sampler, sharpening).to(device).eval().requires_grad_(False)
    except (OSError, ValueError, TypeError, RuntimeError) as error:     # RuntimeError: other or missing weights
        fail(f"{folder}: the policy cannot be loaded ({error}); run the stage that wrote it again")
