"""The calibration cache: found again, told apart, refused when damaged, resumed after an interruption."""

import re
import shutil
import time

import host_prompts as p
import pytest
import torch
from host_server import PromptInterrupted
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.host

STEPS = 6
MANY = 24
SKIP = r"blocks\.[123]|fc2"  # calibrated rounding of a few layers is enough to compare codes
nonces = iter(range(1000, 2000))


def calibration_folder(server):
    return server.models / "dit_quant_calibration"


def caches(server) -> set:
    return {path.name for path in calibration_folder(server).glob("*.safetensors")}


def run(server, file: str | None = None, **changes) -> tuple[str, dict]:
    """Calibrates anew, past the host's own cache; returns the node's text and the quantized file's tensors."""
    prompt = p.BASE | p.again(next(nonces)) | p.calibrate("again", **{"steps": STEPS, "seed": 5, **changes})
    if file is None:
        prompt |= {"shown": p.node("PreviewAny", source=p.link("calibration", 1))}
        return p.report(server.run(prompt), "shown"), {}
    history = server.run(prompt | p.group() | p.quantize(model="again", skip_layers=SKIP) | p.save("quantized", file))
    return p.report(history, "calibration"), load_file(server.output / "diffusion_models" / p.saved_name(file))


def probed_calls(text: str) -> int:
    """What the node's text says of the curvature."""
    return int(re.search(r"curvature measured in (\d+) calls", text)[1])


def assert_same_codes(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    assert all(torch.equal(left[key], right[key]) for key in left)


@pytest.fixture(scope="module")
def first(host_server):
    """(cache file, tensors of the model quantized with it) of a calibration that sampled."""
    before = caches(host_server)
    text, tensors = run(host_server, "calibrated")
    assert "taken from the cache" not in text
    (name,) = caches(host_server) - before
    return calibration_folder(host_server) / name, tensors


def test_second_run_takes_everything_from_the_cache(host_server, first):
    before = caches(host_server)
    text, tensors = run(host_server, "calibrated_again")
    assert f"{p.CALIBRATION_PROMPTS} prompts taken from the cache" in text
    assert caches(host_server) == before
    assert_same_codes(tensors, first[1])


def test_a_latent_in_place_of_sizes(host_server, first):
    """Of a batch its first."""
    text, tensors = run(host_server, "calibrated_latent", latent=p.link("latent"), sizes="64x96")
    assert "taken from the cache" not in text
    assert_same_codes(tensors, first[1])


def test_another_process_finds_the_cache(fresh_server, first):
    calibration_folder(fresh_server).mkdir(exist_ok=True)
    shutil.copy(first[0], calibration_folder(fresh_server))
    before = caches(fresh_server)
    text, _ = run(fresh_server)
    assert f"{p.CALIBRATION_PROMPTS} prompts taken from the cache" in text
    assert caches(fresh_server) == before


@pytest.mark.parametrize(
    "change",
    [{"seed": 6}, {"steps": STEPS + 1}, {"cfg": 2.0}, {"positive": p.link("positive")}, {"sizes": "96x128"}],
    ids=lambda change: next(iter(change)),
)
def test_other_settings_are_another_cache(host_server, first, change):
    before = caches(host_server)
    text, _ = run(host_server, **change)
    assert "taken from the cache" not in text
    assert len(caches(host_server) - before) == 1


def test_other_weights_are_another_cache(host_server, first, lora):
    before = caches(host_server)
    prompt = p.BASE | p.lora(lora) | p.calibrate("lora", steps=STEPS, seed=5)
    text = p.report(
        host_server.run(prompt | p.group() | {"plot": p.node("PreviewImage", images=p.link("groups", 1))}),
        "calibration",
    )
    assert "taken from the cache" not in text
    assert len(caches(host_server) - before) == 1


def truncate(path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])


def replace_by_foreign(path) -> None:
    save_file({"weight": torch.zeros(4)}, path)


def rename_a_tensor(path) -> None:
    """Valid, of ours, but one layer is missing."""
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    name = next(key for key in tensors if key.endswith("|count"))
    tensors[f"{name}s"] = tensors.pop(name)
    save_file(tensors, path, metadata)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (truncate, "cut off"),
        (replace_by_foreign, "not a calibration cache"),
        (rename_a_tensor, "is missing"),
    ],
)
def test_damaged_cache_is_refused_and_recomputed(host_server, first, damage, reason):
    path, expected = first
    damage(path)
    text, tensors = run(host_server, damage.__name__)
    assert "calibration cache refused and recomputed" in text
    assert reason in text
    assert "taken from the cache" not in text
    assert_same_codes(tensors, expected)
    text, _ = run(host_server)
    assert f"{p.CALIBRATION_PROMPTS} prompts taken from the cache" in text


def test_the_report_says_what_the_memory_was_used_for(host_server):
    text, _ = run(host_server)
    blocks = "covariance blocks up to 4096, curvature blocks up to 256"
    assert f"{blocks}, 64 rows sampled per noise level, 1 pass, 0.0" in text
    assert probed_calls(text) >= 1
    text, _ = run(host_server, steps=2, measure_curvature=False)
    assert "curvature" not in text
    text, _ = run(host_server, steps=2, memory_gb=0.017)
    assert "curvatures do not fit 0.017 GB beside the covariances" in text
    text, _ = run(host_server, steps=2, **p.NO_COVARIANCE)
    assert "curvature" not in text
    assert "no covariances, 64 rows sampled per noise level, 1 pass, 0.0" in text
    assert "memory_gb is 0: no covariances, weights will be rounded to nearest" in text


@pytest.mark.parametrize(("factor", "reason"), [(0.0, "this model knows no gradients"), (2.0, "output differs by")])
def test_a_model_that_autograd_cannot_follow_is_calibrated_without(host_server, factor, reason):
    """Refused, or another function there: both nodes say so, statistics are there, and the cache remembers."""
    blocked = p.BASE | {"blocked": p.node("DiTQuantTestNoGradient", model=p.link("model"), factor=factor)}
    for nonce in (1, 2):
        again = p.again(5000 + 10 * nonce + int(factor), "blocked")
        calibrated = again | p.calibrate("again", steps=STEPS, seed=70 + int(factor))
        quantized = p.quantize("W8A8", skip_layers=SKIP) | p.sample("quantized", "latents")
        history = host_server.run(blocked | calibrated | p.group() | quantized)
        text = p.report(history, "calibration")
        assert "curvature not measured" in text
        assert reason in text
        assert ("taken from the cache" in text) == (nonce == 2)
        assert "layers without a measured curvature" in p.report(history, "quantized")
        assert bool(torch.isfinite(host_server.latents(history)["latents"]).all())


def test_several_passes_give_the_codes_of_one(host_server):
    """Too little memory for all covariances at once; interrupted in the second pass, then resumed."""
    many = {"many": p.node("DiTQuantEmojiPrompts", prompts="", first=40, count=MANY)}
    settings = {"positive": p.link("many"), "steps": STEPS, "seed": 11}
    before = caches(host_server)

    def prompt(file: str, **changes) -> dict:
        calibrated = p.BASE | many | p.again(next(nonces)) | p.calibrate("again", **settings, **changes)
        return calibrated | p.group() | p.quantize(model="again", skip_layers=SKIP) | p.save("quantized", file)

    small = {"memory_gb": 0.04, "passes": 8}
    prompt_id = host_server.submit(prompt("stopped", **small))
    deadline = time.monotonic() + 300
    while not any("-2of2" in name for name in caches(host_server) - before) and time.monotonic() < deadline:
        time.sleep(0.02)
    while any(host_server.queue().values()) and time.monotonic() < deadline:
        host_server.interrupt()
        time.sleep(0.05)
    with pytest.raises(PromptInterrupted):
        host_server.wait(prompt_id)

    text = p.report(host_server.run(prompt("passes", **small)), "calibration")
    assert "covariance blocks up to 4096, curvature blocks up to 256" in text
    assert "2 passes, 0.0" in text
    assert f"{MANY} prompts taken from the cache, pass 1" in text
    taken = next(int(line.split()[0]) for line in text.splitlines() if line.endswith("from the cache, pass 2"))
    assert 1 <= taken < MANY
    assert len(caches(host_server) - before) == 2
    text = p.report(host_server.run(prompt("one_pass", memory_gb=4.0)), "calibration")
    assert "curvature blocks up to 256, 64 rows sampled per noise level, 1 pass" in text
    folder = host_server.output / "diffusion_models"
    several, one = (load_file(folder / p.saved_name(file)) for file in ("passes", "one_pass"))
    assert_same_codes(several, one)


def test_interrupted_run_resumes(host_server):
    """Interrupted once some prompts are on disk; the rest is sampled later, to the same codes."""
    many = {"many": p.node("DiTQuantEmojiPrompts", prompts="", first=20, count=MANY)}
    settings = {"positive": p.link("many"), "steps": STEPS, "seed": 9}
    before = caches(host_server)

    def prompt(file: str) -> dict:
        calibrated = p.BASE | many | p.again(next(nonces)) | p.calibrate("again", **settings)
        return calibrated | p.group() | p.quantize(model="again", skip_layers=SKIP) | p.save("quantized", file)

    prompt_id = host_server.submit(prompt("interrupted"))
    deadline = time.monotonic() + 120
    while caches(host_server) == before and time.monotonic() < deadline:
        time.sleep(0.02)
    while any(host_server.queue().values()) and time.monotonic() < deadline:
        host_server.interrupt()
        time.sleep(0.05)
    with pytest.raises(PromptInterrupted) as interruption:
        host_server.wait(prompt_id)
    assert interruption.value.node_type == "DiTQuantCalibrate"

    history = host_server.run(prompt("resumed"))
    text = p.report(history, "calibration")
    taken = next(int(line.split()[0]) for line in text.splitlines() if "taken from the cache" in line)
    assert 1 <= taken < MANY

    (name,) = caches(host_server) - before
    (calibration_folder(host_server) / name).unlink()
    text = p.report(host_server.run(prompt("uninterrupted")), "calibration")
    assert "taken from the cache" not in text
    folder = host_server.output / "diffusion_models"
    resumed, whole = (load_file(folder / p.saved_name(file)) for file in ("resumed", "uninterrupted"))
    assert_same_codes(resumed, whole)
