"""Puts generated tables into the pages, between markers: `<!-- NAME: command -->` and `<!-- end of NAME -->`."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/quality.md", "docs/speed.md")


def insert(page: str, name: str, text: str) -> str:
    """The page with the part between the markers of `name` replaced. Raises ValueError without them."""
    pattern = re.compile(rf"(<!-- {re.escape(name)}: [^>]*-->).*?(<!-- end of {re.escape(name)} -->)", re.DOTALL)
    if pattern.search(page) is None:
        raise ValueError(f"the page has no markers for {name!r}")
    return pattern.sub(lambda found: f"{found[1]}\n\n{text}\n\n{found[2]}", page)


def spread(ratios: list[float]) -> str:
    """'0.14x to 0.20x': the least and the largest, '-' where there is none."""
    return f"{min(ratios):.2f}x to {max(ratios):.2f}x" if ratios else "-"


def publish(name: str, text: str) -> None:
    """Writes the table `name` into the page that has a place for it. Raises ValueError where none has."""
    pages = [path for page in PAGES if (path := ROOT / page).exists()]
    places = [path for path in pages if f"<!-- {name}: " in path.read_text()]
    if len(places) != 1:
        raise ValueError(f"{len(places)} of {', '.join(PAGES)} have markers for {name!r}, not one")
    places[0].write_text(insert(places[0].read_text(), name, text))
