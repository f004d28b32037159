"""The training script on four random pictures, with a clock that ticks once per look: state, resume, export."""

import itertools
import json
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark_scripts import load
from dit_quant.demo.emoji_dit import DiTConfig, EmojiDiT, load_emoji_dit
from dit_quant.demo.pixels import to_rgb
from dit_quant.demo.prompts import load_prompt_table
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

NAMES = ("RED APPLE", "GREEN APPLE", "DOG FACE", "A VERY LONG NAME OF MORE THAN EIGHT WORDS", "CAT")
STEPS = 5


@pytest.fixture
def script(monkeypatch):
    """The module, with a model of one block and a clock of our own."""
    module = load("train_fixture")
    monkeypatch.setattr(module, "EmojiDiT", lambda: EmojiDiT(DiTConfig(depth=1)))
    return module


@pytest.fixture
def package(tmp_path):
    """Laid out like the unpacked npm package: four usable pictures, one with too long a name, one not chosen."""
    folder = tmp_path / "package"
    images = folder / "img" / "google" / "64"
    images.mkdir(parents=True)
    generator = np.random.default_rng(0)
    entries = []
    for i, name in enumerate((*NAMES, "SMILE")):
        pixels = generator.integers(0, 256, (64, 64, 4), dtype=np.uint8)
        Image.fromarray(pixels, "RGBA").save(images / f"{i}.png")
        entries.append(
            {
                "name": name,
                "short_name": f"s{i}",
                "category": "Smileys" if name == "SMILE" else "Food & Drink",
                "image": f"{i}.png",
                "has_img_google": True,
            }
        )
    (folder / "emoji.json").write_text(json.dumps([*entries, {"has_img_google": False}]))
    return folder


@pytest.fixture
def train(script, package, tmp_path, monkeypatch):
    """train(steps): runs the script until it has taken that many steps in all, at one tick per step."""

    def run(steps, state="state"):
        clock = itertools.count()
        monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: float(next(clock)) / 2))
        options = {
            "--emoji": package,
            "--out": tmp_path / "out",
            "--state": tmp_path / state,
            "--minutes": steps / 60,
            "--batch": 3,
        }
        monkeypatch.setattr(sys, "argv", ["train_fixture", *(str(part) for pair in options.items() for part in pair)])
        script.main()
        with safe_open(str(tmp_path / state / "state.safetensors"), framework="pt") as file:
            return load_file(tmp_path / state / "state.safetensors"), int(file.metadata()["step"])

    return run


def test_pictures(script, package):
    """Chosen by category, too long names left out, transparent parts turned white."""
    prompts, latents = script.load_pictures(package)
    assert prompts == ["red apple", "green apple", "dog face", "cat"]
    assert latents.shape == (4, 16, 16, 16)
    with Image.open(package / "img" / "google" / "64" / "2.png") as image:
        pixels = np.asarray(image.resize((32, 32), Image.Resampling.BOX), dtype=np.float32) / 255
    expected = pixels[..., :3] * pixels[..., 3:] + (1 - pixels[..., 3:])
    torch.testing.assert_close(to_rgb(latents[2:3])[0], torch.from_numpy(expected).permute(2, 0, 1), rtol=0, atol=1e-5)


def test_state_round_trip(script, tmp_path):
    """Weights, averages and Adam's moments come back bit by bit, and the optimizer goes on from them."""

    def fresh():
        torch.manual_seed(0)
        model = script.Trainee(6)
        ema = {key: value.detach().clone() for key, value in model.state_dict().items()}
        return model, ema, torch.optim.AdamW(model.parameters(), lr=1e-3)

    def step(model, optimizer, seed):
        torch.manual_seed(seed)
        loss = script.flow_loss(model, torch.randn(2, 16, 16, 16), torch.randint(0, 6, (2, 8)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    model, ema, optimizer = fresh()
    assert script.restore_state(tmp_path, model, ema, optimizer) == (0, 0.0)
    step(model, optimizer, 1)
    ema["words"].add_(1)
    script.save_state(tmp_path, model, ema, optimizer, 1, 12.5)
    assert [path.name for path in tmp_path.iterdir()] == ["state.safetensors"]

    twin, twin_ema, twin_optimizer = fresh()
    assert script.restore_state(tmp_path, twin, twin_ema, twin_optimizer) == (1, 12.5)
    assert torch.equal(twin_ema["words"], ema["words"])
    for one, two in ((model, optimizer), (twin, twin_optimizer)):
        step(one, two, 2)
    for key, value in model.state_dict().items():
        assert torch.equal(value, twin.state_dict()[key]), key


def test_training_resumes(train, tmp_path, capsys):
    """A second run goes on from the first one's step and changes the weights further; twice the same way."""
    first, taken = train(STEPS)
    assert taken >= 2
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "state.safetensors").write_bytes((tmp_path / "state" / "state.safetensors").read_bytes())
    capsys.readouterr()
    second, more = train(2 * STEPS)
    assert f"done: {more} steps" in capsys.readouterr().out
    assert more > taken
    assert any(not torch.equal(first[key], second[key]) for key in first if key.startswith("model."))
    assert {int(value) for key, value in second.items() if key.endswith(".step")} == {more}

    again, same = train(2 * STEPS, "again")
    assert same == more
    assert all(torch.equal(again[key], second[key]) for key in second)


def test_resumed_training_draws_new_noise(train, script, monkeypatch):
    """Seeded by the step: a resumed run must not see the first batches again."""
    seeds, loss = set(), script.flow_loss

    def recording(*args):
        seeds.add(torch.initial_seed())
        return loss(*args)

    monkeypatch.setattr(script, "flow_loss", recording)
    _, taken = train(STEPS)
    train(2 * STEPS)
    assert seeds == {0, taken}


def test_spent_time_takes_no_steps(train):
    """The budget counts the time of earlier runs: nothing is left to do."""
    first, taken = train(STEPS)
    second, same = train(STEPS)
    assert same == taken
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_export_is_what_the_demo_loads(train, tmp_path):
    state, _ = train(STEPS)
    model = load_emoji_dit(tmp_path / "out" / "emoji_dit.safetensors")
    assert model.config.depth == 1
    for key, value in model.state_dict().items():
        assert torch.equal(value, state[f"ema.dit.{key}"].bfloat16().float()), key
    table = load_prompt_table(tmp_path / "out" / "emoji_prompts.safetensors")
    assert table.prompts == ("red apple", "green apple", "dog face", "cat")
    assert list(table.vocabulary) == ["<pad>", "<empty>", "apple", "cat", "dog", "face", "green", "red"]
    assert torch.equal(table.words, state["ema.words"].bfloat16().float())


def test_wan_starts_at_zero_velocity_and_every_part_of_it_learns(script):
    """A block that begins as the identity has no gradient behind its gate: two steps reach every parameter."""
    torch.manual_seed(0)
    model = script.Trainee(6, "wan")
    x, ids = torch.randn(2, 16, 16, 16), torch.randint(0, 6, (2, 8))
    with torch.no_grad():
        assert not model(x, torch.rand(2), ids).any()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(3):
        optimizer.zero_grad()
        script.flow_loss(model, x, ids).backward()
        optimizer.step()
    still = {name for name, value in model.named_parameters() if torch.equal(value, before[name])}
    assert still == set()


def test_wan_is_exported_as_its_loader_reads_it(script, tmp_path):
    torch.manual_seed(0)
    model = script.Trainee(6, "wan")
    script.export(tmp_path, dict(model.state_dict()), list("abcdef"), ["a b"], "wan")
    loaded = load("quality").plain_model("emoji_wan", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(script.FILES["wan"])
    for name, value in loaded[0].state_dict().items():
        assert torch.equal(value, model.dit.state_dict()[name].bfloat16().float()), name
    assert loaded[1].prompts == ("a b",)
