"""Adapters to the host: layout, layers, patcher, sampling, paths."""
