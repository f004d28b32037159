"""A readable SD3-style MMDiT (arXiv 2403.03206), with the parameter names of the host's own class.

The same file therefore loads here and in the host. Letters: B batch, L image tokens, C text tokens,
D hidden width, H heads of width 64.
"""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

HEAD_DIM = 64
FREQUENCIES = 256
NORM_EPS = 1e-6


@dataclass(frozen=True)
class DiTConfig:
    """Shape of the model. `depth` is also the number of heads: D = 64 * depth."""

    depth: int = 4
    latent_channels: int = 16
    patch: int = 2
    context_dim: int = 64
    pooled_dim: int = 64

    @property
    def hidden(self) -> int:
        return HEAD_DIM * self.depth


def timestep_embedding(t: Tensor) -> Tensor:
    """t [B] in 0..1000 -> [B, 256], cosines first."""
    half = FREQUENCIES // 2
    frequency = torch.exp(-math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
    angle = t[:, None].float() * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


def position_embedding(height: int, width: int, dim: int) -> Tensor:
    """Sine-cosine table [height * width, dim] over a grid of side 15, width before height."""

    def axis(positions: Tensor) -> Tensor:
        omega = 1.0 / 10000 ** (torch.arange(dim // 4, dtype=torch.float32) / (dim / 4))
        angle = positions.reshape(-1)[:, None] * omega
        return torch.cat([angle.sin(), angle.cos()], dim=1)

    short = min(height, width)
    half_h, half_w = 7.5 * height / short, 7.5 * width / short
    rows = torch.linspace(7.5 - half_h, 7.5 + half_h, height)
    cols = torch.linspace(7.5 - half_w, 7.5 + half_w, width)
    grid_h, grid_w = torch.meshgrid(rows, cols, indexing="ij")
    return torch.cat([axis(grid_w), axis(grid_h)], dim=1)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """adaLN: x [B, L, D], shift and scale [B, D]."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


class Embedder(nn.Module):
    """Two-layer SiLU perceptron; `mlp.0`, `mlp.2` as the host names them."""

    def __init__(self, d_in: int, d_out: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(d_in, d_out), nn.SiLU(), nn.Linear(d_out, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class Attention(nn.Module):
    """Projections and qk-RMSNorm of one stream; the product itself is joint."""

    def __init__(self, dim: int, project: bool):
        super().__init__()
        self.qkv = nn.Linear(dim, 3 * dim)
        self.ln_q = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        self.ln_k = nn.RMSNorm(HEAD_DIM, eps=NORM_EPS)
        if project:
            self.proj = nn.Linear(dim, dim)

    def heads(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [B, L, D] -> q, k, v [B, H, L, 64]."""
        q, k, v = rearrange(self.qkv(x), "b l (three h d) -> three b h l d", three=3, d=HEAD_DIM)
        return self.ln_q(q), self.ln_k(k), v


class Mlp(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, 4 * dim)
        self.fc2 = nn.Linear(4 * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class StreamBlock(nn.Module):
    """One stream of a joint block. The last text block only feeds the attention (`last=True`)."""

    def __init__(self, dim: int, last: bool = False):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.attn = Attention(dim, project=not last)
        self.last = last
        if not last:
            self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
            self.mlp = Mlp(dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (2 if last else 6) * dim))

    def before(self, x: Tensor, vec: Tensor) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, ...]]:
        shift, scale, *rest = self.adaLN_modulation(vec).chunk(2 if self.last else 6, dim=1)
        return self.attn.heads(modulate(self.norm1(x), shift, scale)), tuple(rest)

    def after(self, x: Tensor, attended: Tensor, rest: tuple[Tensor, ...]) -> Tensor:
        gate_msa, shift, scale, gate_mlp = rest
        x = x + gate_msa[:, None] * self.attn.proj(attended)
        return x + gate_mlp[:, None] * self.mlp(modulate(self.norm2(x), shift, scale))


class JointBlock(nn.Module):
    """Text and image streams with their own weights, meeting in one attention."""

    def __init__(self, dim: int, last: bool):
        super().__init__()
        self.context_block = StreamBlock(dim, last=last)
        self.x_block = StreamBlock(dim)

    def forward(self, context: Tensor, x: Tensor, vec: Tensor) -> tuple[Tensor, Tensor]:
        text, text_rest = self.context_block.before(context, vec)
        image, image_rest = self.x_block.before(x, vec)
        q, k, v = (torch.cat(pair, dim=2) for pair in zip(text, image, strict=True))
        attended = rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)")
        tokens = context.shape[1]
        if not self.context_block.last:
            context = self.context_block.after(context, attended[:, :tokens], text_rest)
        return context, self.x_block.after(x, attended[:, tokens:], image_rest)


class FinalLayer(nn.Module):
    def __init__(self, dim: int, d_out: int):
        super().__init__()
        self.norm_final = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.linear = nn.Linear(dim, d_out)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=1)
        return self.linear(modulate(self.norm_final(x), shift, scale))


class PatchEmbed(nn.Module):
    def __init__(self, channels: int, dim: int, patch: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, dim, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return rearrange(self.proj(x), "b d h w -> b (h w) d")


class EmojiDiT(nn.Module):
    """Velocity model v(x, sigma | prompt) of a rectified flow: x_sigma = (1 - sigma) x0 + sigma noise."""

    def __init__(self, config: DiTConfig = DiTConfig()):
        super().__init__()
        self.config = config
        dim = config.hidden
        self.x_embedder = PatchEmbed(config.latent_channels, dim, config.patch)
        self.t_embedder = Embedder(FREQUENCIES, dim)
        self.y_embedder = Embedder(config.pooled_dim, dim)
        self.context_embedder = nn.Linear(config.context_dim, dim)
        self.joint_blocks = nn.ModuleList(JointBlock(dim, last=i == config.depth - 1) for i in range(config.depth))
        self.final_layer = FinalLayer(dim, config.patch**2 * config.latent_channels)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x [B, 16, h, w], sigma [B] in 0..1, context [B, C, 64], pooled [B, 64] -> velocity [B, 16, h, w]."""
        patch = self.config.patch
        rows, cols = x.shape[-2] // patch, x.shape[-1] // patch
        tokens = self.x_embedder(x)
        tokens = tokens + position_embedding(rows, cols, self.config.hidden).to(tokens)
        vec = self.t_embedder(timestep_embedding(sigma * 1000).to(x.dtype)) + self.y_embedder(pooled)
        text = self.context_embedder(context)
        for block in self.joint_blocks:
            text, tokens = block(text, tokens, vec)
        patches = self.final_layer(tokens, vec)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=cols, p=patch, q=patch)


def config_of(shapes: dict[str, tuple[int, ...]]) -> DiTConfig:
    """Reads the model's shape off its tensors, as the host does."""
    dim, channels, patch, _ = shapes["x_embedder.proj.weight"]
    return DiTConfig(
        depth=dim // HEAD_DIM,
        latent_channels=channels,
        patch=patch,
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
    )


def load_emoji_dit(path: Path, dtype: torch.dtype = torch.float32) -> EmojiDiT:
    """Loads a checkpoint written by benchmarks/train_fixture.py, in `dtype` and without gradients."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118 - not a mapping
    model = EmojiDiT(config_of({key: tuple(value.shape) for key, value in tensors.items()})).to(dtype)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)
