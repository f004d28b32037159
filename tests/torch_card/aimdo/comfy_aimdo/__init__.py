"""The interface of comfy-aimdo 0.4 (ComfyUI's dynamic VRAM) over an emulated card: pages are kept while there is room,
and lost at random. What the host builds on it, its own code does."""
