"""Where our files live among the host's folders."""

from pathlib import Path

import folder_paths

CALIBRATION = "dit_quant_calibration"
ASSETS = Path(__file__).resolve().parents[2] / "demo" / "assets"


def calibration_folder() -> Path:
    return Path(folder_paths.models_dir) / CALIBRATION


def register() -> None:
    """Adds our folder of calibration caches to the host's list."""
    folder_paths.add_model_folder_path(CALIBRATION, str(calibration_folder()))


def output_file(prefix: str) -> Path:
    """The next free `<output>/<prefix>_00001_.safetensors`, like the host's own save nodes."""
    folder, name, counter, _, _ = folder_paths.get_save_image_path(
        prefix.rstrip("/\\"), folder_paths.get_output_directory()
    )
    while (path := Path(folder) / f"{name}_{counter:05}_.safetensors").exists():
        counter += 1
    return path
