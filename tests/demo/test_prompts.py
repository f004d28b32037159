"""Prompts: words, ids, tables, refusals; and that the README lists the words that are known."""

import json
import re

import pytest
import torch
from dit_quant.demo.prompts import EMPTY, MAX_WORDS, PAD, embed, load_prompt_table, word_ids, words_of
from host_location import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ("Lion Face!", ["lion", "face"]),
        ("jack-o-lantern", ["jack", "o", "lantern"]),
        ("  ", []),
        ("T-Rex, 2", ["t", "rex", "2"]),
        ("crème", ["cr", "me"]),
    ],
)
def test_words(prompt, words):
    assert words_of(prompt) == words


@settings(deadline=None)
@given(st.lists(st.sampled_from(["red", "apple", "cat"]), max_size=MAX_WORDS))
def test_ids_are_the_words_then_padding(words):
    vocabulary = {PAD: 0, EMPTY: 1, "red": 2, "apple": 3, "cat": 4}
    ids = word_ids(" ".join(words), vocabulary)
    assert len(ids) == MAX_WORDS
    expected = [vocabulary[word] for word in words] or [vocabulary[EMPTY]]
    assert ids == expected + [0] * (MAX_WORDS - len(expected))


def test_unknown_words_are_all_named(table):
    with pytest.raises(ValueError, match="'zeppelin', 'xylophone'"):
        table.encode(["red zeppelin xylophone"])


def test_long_prompts_are_refused_with_the_number(table):
    table.encode([" ".join(["red"] * MAX_WORDS)])
    with pytest.raises(ValueError, match=f"has {MAX_WORDS + 1} words.* at most {MAX_WORDS}"):
        table.encode([" ".join(["red"] * (MAX_WORDS + 1))])


def test_encoding(table):
    context, pooled = table.encode(["red apple", "cat", ""])
    assert context.shape == (3, MAX_WORDS, 64)
    assert pooled.shape == (3, 64)
    row = {word: table.words[i] for word, i in table.vocabulary.items()}
    torch.testing.assert_close(context[0, 1], row["apple"][:64] + table.positions[1])
    torch.testing.assert_close(context[2, 0], row[EMPTY][:64] + table.positions[0])
    torch.testing.assert_close(pooled[1], row["cat"][64:] + (MAX_WORDS - 1) * row[PAD][64:])


def test_prompts_are_encoded_one_by_one(table):
    both = table.encode(["red apple", "dog face"])
    for i, prompt in enumerate(["red apple", "dog face"]):
        for whole, single in zip(both, table.encode([prompt]), strict=True):
            assert torch.equal(whole[i], single[0])


def test_embedding_has_gradients():
    """It is trained: both tables must be reached."""
    words, positions = torch.randn(5, 6, requires_grad=True), torch.randn(3, 4, requires_grad=True)
    context, pooled = embed(words, positions, torch.tensor([[0, 1, 1]]))
    (context.sum() + pooled.sum()).backward()
    assert words.grad is not None
    assert words.grad[1].abs().min() == 2  # used twice
    assert positions.grad is not None


def test_file_round_trip(table, tmp_path):
    path = tmp_path / "prompts.safetensors"
    meta = {"vocabulary": json.dumps(list(table.vocabulary)), "prompts": json.dumps(table.prompts)}
    save_file({"words": table.words, "positions": table.positions}, path, meta)
    loaded = load_prompt_table(path)
    assert loaded.vocabulary == table.vocabulary
    assert loaded.prompts == table.prompts
    assert torch.equal(loaded.words, table.words)


def test_readme_lists_the_words(assets):
    table = load_prompt_table(assets / "emoji_prompts.safetensors")
    readme = (ROOT / "demo" / "README.md").read_text(encoding="utf-8")
    listed = re.search(r"<!-- words -->(.*)<!-- end of words -->", readme, re.DOTALL)
    assert listed
    assert listed[1].split() == sorted(set(table.vocabulary) - {PAD, EMPTY})
    trained = re.search(r"trained prompts</summary>(.*)</details>", readme, re.DOTALL)
    assert trained
    assert " ".join(trained[1].split()) == ", ".join(sorted(table.prompts))


def test_every_bundled_prompt_is_readable(assets):
    table = load_prompt_table(assets / "emoji_prompts.safetensors")
    context, pooled = table.encode([*table.prompts, ""])
    assert context.isfinite().all()
    assert pooled.isfinite().all()
    assert len(set(table.prompts)) == len(table.prompts)
