"""Trains the emoji DiTs: rectified flow on 32x32 Noto emoji, prompt = emoji name. Resumable.

Pictures: `npm pack emoji-datasource-google` and unpack it; Noto emoji are Apache-2.0 licensed.

    python benchmarks/train_fixture.py --emoji package/ --out demo/assets --state train_state --minutes 60
    python benchmarks/train_fixture.py --layout wan --emoji package/ --out wan/ --state wan_state --minutes 60

The first is the bundled model; the second, of another family, is what quality.py --wan reads.
"""

import argparse
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
from dit_quant.demo.emoji_dit import EmojiDiT
from dit_quant.demo.pixels import to_latent
from dit_quant.demo.prompts import EMPTY, MAX_WORDS, PAD, embed, word_ids, words_of
from emoji_wan import EmojiWan
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

CATEGORIES = ("Animals & Nature", "Food & Drink")
EXTRA = (
    *("ghost", "alien", "space_invader", "skull", "broken_heart", "heart", "grinning", "joy", "heart_eyes"),
    *("sunglasses", "sob", "scream", "robot_face", "clown_face", "money_mouth_face", "christmas_tree", "balloon"),
    *("gift", "soccer", "basketball", "rainbow", "volcano", "rocket", "car", "guitar", "star", "snowman"),
    *("jack_o_lantern", "umbrella", "trophy"),
)
EMA_DECAY = 0.9985
PROMPT_DROP = 0.1
WARMUP = 200
POOLED_DIM = 64
FILES = {
    "sd3": ("emoji_dit.safetensors", "emoji_prompts.safetensors"),
    "wan": ("emoji_wan.safetensors", "wan_prompts.safetensors"),
}


def load_pictures(package: Path) -> tuple[list[str], Tensor]:
    """Unpacked npm package -> prompts and latents [n, 16, 16, 16]. Colour is composited over white."""
    entries = [e for e in json.loads((package / "emoji.json").read_text()) if e["has_img_google"]]
    chosen = [e for e in entries if e["category"] in CATEGORIES or e["short_name"] in EXTRA]
    chosen = [e for e in chosen if len(words_of(e["name"])) <= MAX_WORDS]
    pictures = []
    for entry in chosen:
        image = Image.open(package / "img" / "google" / "64" / entry["image"]).convert("RGBA")
        rgba = np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255
        alpha = rgba[..., 3:]
        pictures.append(np.concatenate([rgba[..., :3] * alpha + 1 - alpha, alpha], axis=-1))
    rgba = torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2)
    return [" ".join(words_of(e["name"])) for e in chosen], to_latent(rgba)


class Trainee(nn.Module):
    """The DiT and its prompt table, trained together."""

    def __init__(self, vocabulary_size: int, layout: str = "sd3"):
        super().__init__()
        self.dit = EmojiDiT() if layout == "sd3" else EmojiWan()
        context_dim = self.dit.config.context_dim
        self.words = nn.Parameter(torch.randn(vocabulary_size, context_dim + POOLED_DIM))
        self.positions = nn.Parameter(torch.randn(MAX_WORDS, context_dim) * 0.5)
        self.apply(initialise)
        for module in start_at_zero(self.dit):
            nn.init.zeros_(module.weight)

    def forward(self, x: Tensor, sigma: Tensor, ids: Tensor) -> Tensor:
        return self.dit(x, sigma, *embed(self.words, self.positions, ids))


def start_at_zero(dit: EmojiDiT | EmojiWan) -> list[nn.Linear]:
    """Modulations and output: every block begins as the identity (adaLN-zero), and the velocity as 0."""
    if isinstance(dit, EmojiWan):
        return [dit.time_projection[1], dit.head.head]
    streams = [stream for block in dit.joint_blocks for stream in (block.context_block, block.x_block)]
    return [*(s.adaLN_modulation[1] for s in (*streams, dit.final_layer)), dit.final_layer.linear]


def initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Conv2d | nn.Conv3d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        nn.init.zeros_(module.bias)


def draw_sigma(batch: int) -> Tensor:
    """Half logit-normal, half uniform, both pushed to the noisy side by SD3's shift of 2."""
    t = torch.where(torch.rand(batch) < 0.5, torch.sigmoid(torch.randn(batch)), torch.rand(batch))
    return 2 * t / (1 + t)


def flow_loss(model: nn.Module, clean: Tensor, ids: Tensor) -> Tensor:
    """Rectified flow (arXiv 2209.03003): predict noise - clean at x = (1 - sigma) clean + sigma noise."""
    noise, sigma = torch.randn_like(clean), draw_sigma(len(clean))
    level = sigma[:, None, None, None]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        velocity = model((1 - level) * clean + level * noise, sigma, ids)
    return (velocity.float() - (noise - clean)).square().mean()


def learning_rate(elapsed: float, step: int, peak: float) -> float:
    """Warm-up by steps, then cosine to 2 % over the wall-clock budget (elapsed in 0..1)."""
    cosine = 0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * min(elapsed, 1)))
    return peak * cosine * min(1, (step + 1) / WARMUP)


def save_state(path: Path, model: nn.Module, ema: dict, optimizer, step: int, spent: float) -> None:
    """Weights, averages and Adam moments as safetensors; replaced atomically."""
    tensors = {f"model.{k}": v.detach() for k, v in model.state_dict().items()}
    tensors |= {f"ema.{k}": v for k, v in ema.items()}
    for i, moments in optimizer.state_dict()["state"].items():
        tensors |= {f"adam.{i}.{k}": torch.as_tensor(v).clone() for k, v in moments.items()}
    path.mkdir(parents=True, exist_ok=True)
    temporary = path / "state.tmp"
    save_file({k: v.contiguous() for k, v in tensors.items()}, temporary, {"step": str(step), "spent": str(spent)})
    temporary.replace(path / "state.safetensors")


def restore_state(path: Path, model: nn.Module, ema: dict, optimizer) -> tuple[int, float]:
    """-> (step, seconds already spent); (0, 0) when there is nothing to resume."""
    file = path / "state.safetensors"
    if not file.exists():
        return 0, 0.0
    with safe_open(str(file), framework="pt") as handle:
        meta = handle.metadata()
    tensors = load_file(file)
    model.load_state_dict({k.removeprefix("model."): v for k, v in tensors.items() if k.startswith("model.")})
    for key in ema:
        ema[key].copy_(tensors[f"ema.{key}"])
    state = optimizer.state_dict()
    for key, value in tensors.items():
        if key.startswith("adam."):
            _, index, name = key.split(".")
            state["state"].setdefault(int(index), {})[name] = value
    optimizer.load_state_dict(state)
    return int(meta["step"]), float(meta["spent"])


def export(out: Path, ema: dict[str, Tensor], vocabulary: list[str], prompts: list[str], layout: str = "sd3") -> None:
    """bf16 model in the host's key layout, and the prompt table beside it."""
    model_file, table_file = FILES[layout]
    out.mkdir(parents=True, exist_ok=True)
    model = {k.removeprefix("dit."): v.bfloat16().contiguous() for k, v in ema.items() if k.startswith("dit.")}
    licence = {"license": "Apache-2.0", "training_data": "Noto emoji (Apache-2.0), emoji-datasource-google 16.0.0"}
    save_file(model, out / model_file, licence)
    table = {"words": ema["words"].bfloat16().contiguous(), "positions": ema["positions"].bfloat16().contiguous()}
    meta = licence | {"vocabulary": json.dumps(vocabulary), "prompts": json.dumps(prompts)}
    save_file(table, out / table_file, meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layout", choices=tuple(FILES), default="sd3")
    parser.add_argument("--emoji", type=Path, required=True, help="unpacked emoji-datasource-google package")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--state", type=Path, required=True, help="folder for the resumable state")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--compile", action="store_true")
    args = parser.parse_args()

    prompts, latents = load_pictures(args.emoji)
    vocabulary = [PAD, EMPTY, *sorted({word for prompt in prompts for word in words_of(prompt)})]
    lookup = {word: i for i, word in enumerate(vocabulary)}
    ids = torch.tensor([word_ids(prompt, lookup) for prompt in prompts])
    empty = torch.tensor(word_ids("", lookup))
    print(f"{len(prompts)} pictures, {len(vocabulary)} words", flush=True)

    torch.manual_seed(0)
    model = Trainee(len(vocabulary), args.layout)
    ema = {k: v.detach().clone() for k, v in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=(0.9, 0.95), weight_decay=0.01, foreach=True)
    step, spent = restore_state(args.state, model, ema, optimizer)
    torch.manual_seed(step)
    loss_of = torch.compile(model) if args.compile else model

    started, running, saved = time.monotonic() - spent, 0.0, time.monotonic()
    while (elapsed := time.monotonic() - started) < args.minutes * 60:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(elapsed / (args.minutes * 60), step, args.lr)
        chosen = torch.randperm(len(prompts))[: args.batch]
        batch_ids = torch.where(torch.rand(len(chosen), 1) < PROMPT_DROP, empty, ids[chosen])
        loss = flow_loss(loss_of, latents[chosen], batch_ids)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 1) / (step + 10))
        torch._foreach_lerp_(list(ema.values()), [v.detach() for v in model.state_dict().values()], 1 - decay)
        running = loss.item() if step == 0 else 0.98 * running + 0.02 * loss.item()
        step += 1
        if step % 50 == 0:
            print(f"step {step}  {elapsed / 60:.1f} min  loss {running:.4f}", flush=True)
        if time.monotonic() - saved > 120:
            save_state(args.state, model, ema, optimizer, step, time.monotonic() - started)
            export(args.out, ema, vocabulary, prompts, args.layout)
            saved = time.monotonic()
    save_state(args.state, model, ema, optimizer, step, time.monotonic() - started)
    export(args.out, ema, vocabulary, prompts, args.layout)
    print(f"done: {step} steps, loss {running:.4f}")


if __name__ == "__main__":
    main()
