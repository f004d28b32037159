"""The bundled emoji DiT: model, prompts, sampler. Needs torch and safetensors only, no host."""
