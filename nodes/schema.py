"""What our nodes' schemas share: types, category, and arguments that older hosts do not know."""

import dataclasses

from comfy_api.latest import io

CATEGORY = "model/quantization"
CalibrationType = io.Custom("DIT_QUANT_CALIBRATION")
_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**fields) -> io.Schema:
    """io.Schema without the fields that this host's version lacks (search_aliases came with 0.11)."""
    return io.Schema(category=CATEGORY, **{name: value for name, value in fields.items() if name in _KNOWN})
