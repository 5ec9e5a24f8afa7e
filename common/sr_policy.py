"""
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
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from peft import PeftModel
from torch import Tensor, nn

from common import dist, grpo, run, samplers, sr_pipelines
from common.sr_detail import condition, contrast, detail_patches, upsample


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
        run.fail(f"{steps} denoising steps: they should divide the {count} time steps that the policy was trained with")
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
        constants = {"times": torch.tensor(times), "levels": samplers.variance_preserving(ends.float()),
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
        return samplers.clean_and_noise("v_prediction", x, v, samplers.at(self.levels, index))

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
    now, after = (samplers.at(policy.levels, i) for i in (index, index + 1))
    return samplers.step(sampler, *policy.predict(x, index, seen), now=now, after=after, eta=eta)


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
        now, after = (samplers.at(policy.levels, j) for j in (index, index + 1))
        clean, error = policy.predict(x, index, seen)
        inside = start <= i < start + width
        mean, std = samplers.step(sampler, clean, error, now=now, after=after, eta=eta if inside else 0.0)
        if inside:
            latents += [] if latents else [x]
            x = mean + std * noise[:, 1 + i - start]
            latents.append(x)
            logp.append(grpo.gaussian_logp(x, mean, std))
        else:
            x = mean
        if policy.sampler.solver == "dpm" and i >= start + width:
            if past and i < last:
                x = x + samplers.second_order(clean, past[0], before=past[1], now=now, after=after)
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
        run.fail(f"{folder}: the policy cannot be loaded ({error}); run the stage that wrote it again")
