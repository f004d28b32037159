"""What the tests of the demo share: small random models and word tables, and the bundled files."""

import pytest
import torch
from dit_quant.demo.__main__ import ASSETS, MODEL_FILE, PROMPTS_FILE
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT
from dit_quant.demo.prompts import EMPTY, MAX_WORDS, PAD, PromptTable

WORDS = ("red", "apple", "green", "pear", "cat", "dog", "face", "sun")
PROMPTS = ("red apple", "green apple", "pear", "cat", "cat face", "dog", "dog face", "sun", "green pear", "red sun")


@pytest.fixture
def tiny():
    """A random EmojiDiT of two blocks, hidden 128, gradients off."""
    torch.manual_seed(0)
    return EmojiDiT(DiTConfig(depth=2)).eval().requires_grad_(False)


@pytest.fixture
def table():
    """A random word table."""
    torch.manual_seed(1)
    vocabulary = {word: i for i, word in enumerate((PAD, EMPTY, *WORDS))}
    return PromptTable(torch.randn(len(vocabulary), 128), torch.randn(MAX_WORDS, 64), vocabulary, PROMPTS)


@pytest.fixture(scope="session")
def assets():
    """The folder of the bundled model."""
    for name in (MODEL_FILE, PROMPTS_FILE):
        if not (ASSETS / name).is_file():
            pytest.skip(f"demo/assets/{name} is missing: not a whole checkout")
    return ASSETS
