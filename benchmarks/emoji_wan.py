"""A small Wan-style DiT (arXiv 2503.20314), with the parameter names of the host's own class.

Where the bundled SD3-style model has a modulation per block and joint attention, this one has one modulation shared
by all blocks plus a learned table per block, self-attention with rotary positions, and cross-attention whose keys
and values read the prompt alone. Letters: B batch, L image tokens, C text tokens, D width, H heads of width 128.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from dit_quant.demo.emoji_dit import FREQUENCIES, NORM_EPS, timestep_embedding
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

HEAD_DIM = 128
AXES = (HEAD_DIM - 4 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6), 2 * (HEAD_DIM // 6))  # frame, row, column


@dataclass(frozen=True)
class WanConfig:
    """Shape of the model. The feed-forward is 4 * dim wide."""

    dim: int = 256
    depth: int = 4
    latent_channels: int = 16
    patch: int = 2
    context_dim: int = 64

    @property
    def hidden(self) -> int:
        return self.dim


def rotary(rows: int, cols: int) -> Tensor:
    """Angles [rows * cols, 64] of the three axes of a one-frame grid, base 10000."""
    grid = torch.meshgrid(torch.arange(rows), torch.arange(cols), indexing="ij")
    positions = (torch.zeros(rows * cols), grid[0].flatten(), grid[1].flatten())
    angles = [
        position[:, None].float() / 10000 ** (torch.arange(0, width, 2) / width)
        for position, width in zip(positions, AXES, strict=True)
    ]
    return torch.cat(angles, dim=1)


def rotate_pairs(x: Tensor, angle: Tensor) -> Tensor:
    """x [B, H, L, 128]: neighbouring channels turned by angle [L, 64]."""
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angle.cos().to(x), angle.sin().to(x)
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2)


def heads(x: Tensor) -> Tensor:
    return rearrange(x, "b l (h d) -> b h l d", d=HEAD_DIM)


class WanAttention(nn.Module):
    """Projections with RMSNorm over the whole width of q and k; `context=None` attends to itself."""

    def __init__(self, dim: int):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q = nn.RMSNorm(dim, eps=NORM_EPS)
        self.norm_k = nn.RMSNorm(dim, eps=NORM_EPS)

    def forward(self, x: Tensor, context: Tensor | None, angle: Tensor | None) -> Tensor:
        source = x if context is None else context
        q, k, v = heads(self.norm_q(self.q(x))), heads(self.norm_k(self.k(source))), heads(self.v(source))
        if angle is not None:
            q, k = rotate_pairs(q, angle), rotate_pairs(k, angle)
        return self.o(rearrange(F.scaled_dot_product_attention(q, k, v), "b h l d -> b l (h d)"))


class WanBlock(nn.Module):
    """Self-attention, cross-attention and feed-forward; `modulation` [1, 6, D] is added to the shared one."""

    def __init__(self, dim: int):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.norm3 = nn.LayerNorm(dim, eps=NORM_EPS)
        self.self_attn = WanAttention(dim)
        self.cross_attn = WanAttention(dim)
        self.ffn = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(approximate="tanh"), nn.Linear(4 * dim, dim))
        self.modulation = nn.Parameter(torch.zeros(1, 6, dim))

    def forward(self, x: Tensor, shared: Tensor, context: Tensor, angle: Tensor) -> Tensor:
        """x [B, L, D], shared [B, 6, D], context [B, C, D]."""
        shift_a, scale_a, gate_a, shift_f, scale_f, gate_f = (self.modulation + shared).to(x.dtype).chunk(6, dim=1)
        x = x + gate_a * self.self_attn(torch.addcmul(shift_a, self.norm1(x), 1 + scale_a), None, angle)
        x = x + self.cross_attn(self.norm3(x), context, None)
        return x + gate_f * self.ffn(torch.addcmul(shift_f, self.norm2(x), 1 + scale_f))


class WanHead(nn.Module):
    def __init__(self, dim: int, d_out: int):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False, eps=NORM_EPS)
        self.head = nn.Linear(dim, d_out)
        self.modulation = nn.Parameter(torch.zeros(1, 2, dim))

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        shift, scale = (self.modulation + time[:, None]).to(x.dtype).chunk(2, dim=1)
        return self.head(torch.addcmul(shift, self.norm(x), 1 + scale))


class EmojiWan(nn.Module):
    """Velocity model v(x, sigma | prompt) of a rectified flow, with the call of EmojiDiT; `pooled` is not read."""

    def __init__(self, config: WanConfig = WanConfig()):
        super().__init__()
        self.config = config
        dim, patch = config.dim, (1, config.patch, config.patch)
        self.patch_embedding = nn.Conv3d(config.latent_channels, dim, kernel_size=patch, stride=patch)
        self.text_embedding = nn.Sequential(
            nn.Linear(config.context_dim, dim), nn.GELU(approximate="tanh"), nn.Linear(dim, dim)
        )
        self.time_embedding = nn.Sequential(nn.Linear(FREQUENCIES, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(WanBlock(dim) for _ in range(config.depth))
        self.head = WanHead(dim, config.patch**2 * config.latent_channels)

    def forward(self, x: Tensor, sigma: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        """x [B, 16, h, w], sigma [B] in 0..1, context [B, C, 64] -> velocity [B, 16, h, w]."""
        patch = self.config.patch
        rows, cols = x.shape[-2] // patch, x.shape[-1] // patch
        tokens = self.patch_embedding(x[:, :, None]).flatten(2).transpose(1, 2)
        time = self.time_embedding(timestep_embedding(sigma * 1000).to(x.dtype))
        shared = self.time_projection(time).unflatten(1, (6, self.config.dim))
        text, angle = self.text_embedding(context), rotary(rows, cols)
        for block in self.blocks:
            tokens = block(tokens, shared, text, angle)
        patches = self.head(tokens, time)
        return rearrange(patches, "b (h w) (p q c) -> b c (h p) (w q)", h=rows, w=cols, p=patch, q=patch)


def load_emoji_wan(path: Path, dtype: torch.dtype = torch.float32) -> EmojiWan:
    """Loads a checkpoint written by train_fixture.py --layout wan, in `dtype` and without gradients."""
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).to(dtype) for key in file.keys()}  # noqa: SIM118 - not a mapping
    config = WanConfig(
        dim=tensors["head.modulation"].shape[-1],
        depth=1 + max(int(key.split(".")[1]) for key in tensors if key.startswith("blocks.")),
        latent_channels=tensors["patch_embedding.weight"].shape[1],
        patch=tensors["patch_embedding.weight"].shape[-1],
        context_dim=tensors["text_embedding.0.weight"].shape[1],
    )
    model = EmojiWan(config).to(dtype)
    model.load_state_dict(tensors)
    return model.eval().requires_grad_(False)
