"""Identities of weights and settings."""

import pytest
import torch
from dit_quant.quant_core.fingerprint import settings_key, tensor_fingerprint

SHAPES = [(1, 1), (7, 33), (63, 100), (512, 1024)]


def weight(shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
def test_same_values_same_identity_whatever_the_memory(shape):
    w = weight(shape)
    print_of = tensor_fingerprint(w)
    assert print_of == tensor_fingerprint(w.clone())
    assert print_of == tensor_fingerprint(w.T.contiguous().T)
    assert print_of == tensor_fingerprint(w.clone().requires_grad_())


@pytest.mark.parametrize("stored", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_stored_precision_may_be_loaded_in_a_wider_one(shape, stored):
    w = weight(shape).to(stored)
    assert tensor_fingerprint(w) == tensor_fingerprint(w.float()) == tensor_fingerprint(w.to(torch.bfloat16))


@pytest.mark.parametrize("shape", SHAPES)
def test_a_change_of_the_whole_weight_shows(shape):
    w = weight(shape)
    changes = [w * 1.01, -w, w + 0.01 * weight((shape[0], 1), 1) @ weight((1, shape[1]), 2) + 0.01, weight(shape, 3)]
    assert all(tensor_fingerprint(changed) != tensor_fingerprint(w) for changed in changes)


def test_shape_is_part_of_the_identity():
    w = weight((6, 6))
    assert len({tensor_fingerprint(w.reshape(shape)) for shape in ((6, 6), (4, 9), (36, 1))}) == 3


def test_settings_ignore_the_order_of_names_but_nothing_else():
    assert settings_key({"a": 1, "b": [2, 3]}, "x") == settings_key({"b": [2, 3], "a": 1}, "x")
    different = [({"a": 1},), ({"a": 2},), ({"a": "1"},), ({"a": 1}, None), ([{"a": 1}],), ({"a": [1]},)]
    assert len({settings_key(*parts) for parts in different}) == len(different)


@pytest.mark.parametrize("shape", [(4096, 4096), (12288, 3072), (3072, 3072)])
def test_every_column_has_its_turn(shape):
    """A step that shares a divisor with K would look at few columns only, of the commonest shapes at one."""
    w = torch.zeros(shape, dtype=torch.bfloat16)
    seen = 0
    for part in range(4):
        changed = w.clone()
        changed[:, part::4] = 1
        changed[:, 0] = 0
        seen += tensor_fingerprint(changed) != tensor_fingerprint(w)
    assert seen == 4
