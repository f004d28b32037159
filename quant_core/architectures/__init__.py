"""What is known of each DiT family: which Linears to round, and who feeds them."""

from .family import Family, Role, family_of
from .sd3 import SD3
from .select import FAMILIES, NotADiT, select_layers

__all__ = ["FAMILIES", "SD3", "Family", "NotADiT", "Role", "family_of", "select_layers"]
