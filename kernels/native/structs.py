"""The structures that C is given, field by field as in its headers. `kept`: tensors whose memory they point to."""

import ctypes

import torch

# as numbered in lanes.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Table(ctypes.Structure):
    """tables.h"""

    kept: object = None

    _fields_ = (("data", POINTER), ("dtype", INT), ("rows", SIZE))


class Group(ctypes.Structure):
    """tables.h"""

    kept: object = None

    _fields_ = (("index", POINTER), ("fraction", POINTER))


class Tokens(ctypes.Structure):
    """quantizer.h"""

    kept: object = None

    _fields_ = (
        ("x", POINTER),
        ("dtype", INT),
        ("order", INT),
        ("symmetric", INT),
        ("M", SIZE),
        ("K", SIZE),
        ("stride", SIZE),
        ("rank", SIZE),
        ("shift", Table),
        ("smooth", Table),
        ("fixed_scale", Table),
        ("fixed_zero", Table),
        ("directions", POINTER),
    )


class Weight(ctypes.Structure):
    """product.h"""

    kept: object = None

    _fields_ = (
        ("w", POINTER),
        ("levels", POINTER),
        ("table", POINTER),
        ("N", SIZE),
        ("G", SIZE),
        ("rank", SIZE),
        ("column_scale", Table),
        ("bias", Table),
        ("correction", Table),
        ("column_sum", POINTER),
        ("responses", POINTER),
    )
