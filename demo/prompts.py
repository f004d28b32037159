"""Prompts of the bundled DiT: words looked up in a small learned table, in place of a text encoder."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

MAX_WORDS = 8
PAD, EMPTY = "<pad>", "<empty>"


def words_of(prompt: str) -> list[str]:
    """'Lion Face!' -> ['lion', 'face']."""
    return re.findall(r"[a-z0-9]+", prompt.lower())


def word_ids(prompt: str, vocabulary: dict[str, int]) -> list[int]:
    """Prompt -> exactly MAX_WORDS ids; the empty prompt is a word of its own.

    Raises ValueError naming the unknown words, or the length when there are too many.
    """
    words = words_of(prompt) or [EMPTY]
    unknown = [word for word in words if word not in vocabulary]
    if unknown:
        listed = ", ".join(map(repr, unknown))
        raise ValueError(f"the emoji model does not know {listed}; demo/README.md lists its words")
    if len(words) > MAX_WORDS:
        raise ValueError(f"prompt has {len(words)} words, the emoji model reads at most {MAX_WORDS}: {prompt!r}")
    return [vocabulary[word] for word in words] + [vocabulary[PAD]] * (MAX_WORDS - len(words))


@dataclass(frozen=True)
class PromptTable:
    """Word table [V, context + pooled], position table [MAX_WORDS, context], and the trained prompts."""

    words: Tensor
    positions: Tensor
    vocabulary: dict[str, int]
    prompts: tuple[str, ...]

    def encode(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Prompts -> context [B, MAX_WORDS, context] and pooled [B, pooled], fp32."""
        ids = torch.tensor([word_ids(prompt, self.vocabulary) for prompt in prompts])
        return embed(self.words, self.positions, ids)


def embed(words: Tensor, positions: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """ids [B, MAX_WORDS] -> context [B, MAX_WORDS, context], pooled [B, pooled] (sum over the words)."""
    context_dim = positions.shape[1]
    rows = words[ids]
    return rows[..., :context_dim] + positions, rows[..., context_dim:].sum(dim=1)


def load_prompt_table(path: Path) -> PromptTable:
    """Reads the table that benchmarks/train_fixture.py writes beside the model."""
    with safe_open(str(path), framework="pt") as file:
        meta = file.metadata()
        return PromptTable(
            words=file.get_tensor("words").float(),
            positions=file.get_tensor("positions").float(),
            vocabulary={word: i for i, word in enumerate(json.loads(meta["vocabulary"]))},
            prompts=tuple(json.loads(meta["prompts"])),
        )
