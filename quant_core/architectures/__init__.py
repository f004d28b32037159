"""What is known of each DiT family: which Linears to round, and who feeds them."""

from .family import Family, Role, family_of
from .sd3 import SD3

FAMILIES: tuple[Family, ...] = (SD3,)

__all__ = ["FAMILIES", "Family", "Role", "family_of"]
