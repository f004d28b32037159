"""Calibrated quantization of Diffusion Transformers: torch, numpy and scipy only, no host, no triton."""
