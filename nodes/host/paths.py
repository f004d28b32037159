"""Where our files live among the host's folders."""

from pathlib import Path

import folder_paths

CALIBRATION = "dit_quant_calibration"
ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"


def calibration_folder() -> Path:
    """One that extra_model_paths.yaml names, else in the models folder."""
    return Path(folder_paths.get_folder_paths(CALIBRATION)[0])


def register() -> None:
    """Adds our folder of calibration caches to the host's list."""
    folder_paths.add_model_folder_path(CALIBRATION, str(Path(folder_paths.models_dir) / CALIBRATION))


def output_file(prefix: str) -> Path:
    """The next free `<output>/<prefix>_00001_.safetensors`, like the host's own save nodes; not one of a name that a
    loader would find in another folder first, where an older file was moved to."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix.rstrip("/\\"), folder_paths.get_output_directory()
    )
    while (path := Path(folder) / f"{name}_{counter:05}_.safetensors").exists() or is_listed(path):
        counter += 1
    return path


def is_listed(path: Path) -> bool:
    """Whether the host lists a diffusion model under the name that a file at `path` would get."""
    for folder in folder_paths.get_folder_paths("diffusion_models"):
        if path.is_relative_to(folder):
            return folder_paths.get_full_path("diffusion_models", str(path.relative_to(folder))) is not None
    return False
