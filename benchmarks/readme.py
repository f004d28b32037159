"""Puts generated tables between the markers of the README: `<!-- NAME: command -->` and `<!-- end of NAME -->`."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def insert(readme: str, name: str, text: str) -> str:
    """The README with the part between the markers of `name` replaced. Raises ValueError without them."""
    pattern = re.compile(rf"(<!-- {re.escape(name)}: [^>]*-->).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if pattern.search(readme) is None:
        raise ValueError(f"the README has no markers for {name!r}")
    return pattern.sub(lambda found: f"{found[1]}\n\n{text}\n\n{found[2]}", readme)


def spread(ratios: list[float]) -> str:
    """'0.14x to 0.20x': the least and the largest, '-' where there is none."""
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x" if ratios else "-"


def publish(name: str, text: str) -> None:
    """Writes the table `name` into the README."""
    path = ROOT / "README.md"
    path.write_text(insert(path.read_text(), name, text))
