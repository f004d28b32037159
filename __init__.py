"""DiT Quant: calibrated 8- and 4-bit Diffusion Transformers for ComfyUI. Importing this costs nothing."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():
    """The host's V3 entry point; everything heavy is imported here, on demand."""
    from .nodes import DiTQuantExtension

    return DiTQuantExtension()
