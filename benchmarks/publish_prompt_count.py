"""Writes the prompt count table from benchmarks/results/prompt_count.json (made by prompt_count.py).

python benchmarks/publish_prompt_count.py
"""

import json

from pages import ROOT, publish
from prompt_count import table

if __name__ == "__main__":
    publish("prompt count table", table(json.loads((ROOT / "benchmarks/results/prompt_count.json").read_text())))
