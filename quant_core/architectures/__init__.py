"""What is known of each DiT family: which Linears to round, and who feeds them."""

from .family import Family, Role, family_of
from .sd3 import SD3
from .select import FAMILIES, NotADiT, select_layers
from .wan import WAN

__all__ = ["FAMILIES", "SD3", "WAN", "Family", "NotADiT", "Role", "family_of", "select_layers"]
