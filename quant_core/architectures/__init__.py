"""What is known of each DiT family: which Linears to round, and who feeds them."""

from .family import Family, Role, family_of
from .select import FAMILIES, NotADiT, select_layers

__all__ = ["FAMILIES", "Family", "NotADiT", "Role", "family_of", "select_layers"]
