"""How an op is made known to torch: its schema, what runs it, and its fake."""

from collections.abc import Callable

import torch

NAMESPACE = "dit_quant"


def schema(arguments: dict[str, str], results: str) -> str:
    """arguments: name -> type, none of them with a default."""
    return f"({', '.join(f'{kind} {name}' for name, kind in arguments.items())}) -> {results}"


def register(ops: dict[str, tuple[str, Callable, Callable]]) -> torch.library.Library | None:
    """Defines each name -> (schema, function, fake) once a process: the host and a test may import this package under
    two names, and the first one's dispatcher then serves both. The library must outlive its ops."""
    if all(hasattr(getattr(torch.ops, NAMESPACE), name) for name in ops):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    for name, (signature, function, fake) in ops.items():
        library.define(f"{name}{signature}", tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, function, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)
    return library
