"""The structures that C is given, field by field as in its headers."""

import ctypes

import torch

# as numbered in lanes.h
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
POINTER, SIZE, INT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int32


class Struct(ctypes.Structure):
    """kept: the tensors whose memory it points to."""

    kept: object = None


class Table(Struct):
    """tables.h"""

    _fields_ = (("data", POINTER), ("dtype", INT), ("rows", SIZE))


class Group(Struct):
    """tables.h"""

    _fields_ = (("index", POINTER), ("fraction", POINTER))


class Tokens(Struct):
    """quantizer.h"""

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


class Weight(Struct):
    """product.h"""

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
