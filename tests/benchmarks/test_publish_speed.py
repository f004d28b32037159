"""The summary of a GPU: ranges over wide layers with many tokens, of what was timed."""

from benchmark_scripts import load

publish_speed, shapes = (load(name) for name in ("publish_speed", "kernel_shapes"))


def row(K, N, M, **milliseconds):
    timed = {name: {"ms": [value, value, value], "roofline": 0.5} for name, value in milliseconds.items()}
    return {"model": "FLUX", "layer": "fc1", "K": K, "N": N, "M": M, "dtype": "bfloat16", "timed": timed}


def test_summary_of_a_gpu():
    bf16, quantizer = "bf16 F.linear", "quantize_along of W8A8, triton"
    product = "int8_linear of W8A8 fast, triton"
    result = {
        "machine": {"device": "NVIDIA X"},
        "versions": {"torch": "2", "comfy-kitchen": "0.2"},
        # a row of each layer takes 0.1 microseconds to copy
        "roofline": {"copy_gb_per_s": 3 * 3072 / 100},
        "rows": [
            row(3072, 3072, 4096, **{bf16: 3.0, "native int8": 4.0, "W8A8": 2.0, quantizer: 0.5, product: 1.0}),
            row(3072, 9216, 16384, **{bf16: 6.0, "native int8": 5.0, "W8A8": 4.0, "W4A8": 3.0, product: 24.0}),
            # too few tokens, too narrow
            row(3072, 3072, 1024, **{bf16: 9.0, "W8A8": 1.0}),
            row(1152, 3072, 4096, **{bf16: 9.0, "W8A8": 1.0}),
        ],
    }
    lines = publish_speed.summary_table(result).splitlines()
    assert lines[2] == "| W8A8 | 1.50x to 1.50x | 1.25x to 2.00x | - | - |"
    assert lines[5] == "| W4A8 | 2.00x to 2.00x | 1.67x to 1.67x | - | - |"
    assert "of 2 with K and N of 3072" in lines[-1]
    assert "NVIDIA X; torch 2, comfy-kitchen 0.2." in lines[-1]
    assert "copying memory: W8A8 50% to 50%." in lines[-1]
    copied = {
        **result,
        "rows": [r | {"timed": r["timed"] | row(1, 1, 1, **{shapes.COPY: 0.4})["timed"]} for r in result["rows"]],
    }
    last = publish_speed.summary_table(copied).splitlines()[-1]
    assert "copying as many bytes: W8A8 80% to 80%." in last
    assert last.endswith(f"would be {6 / 12.4:.2f}x to {3 / 1.4:.2f}x bf16 F.linear.")
    # the second layer's product is 12 times the first's, which is the faster one: 12 ms, and 1.6384 ms to copy
    assert "77 TOPS" in lines[-1]
    assert lines[-1].endswith(f"would be {6 / 13.6384:.2f}x to {3 / 1.4096:.2f}x bf16 F.linear.")
