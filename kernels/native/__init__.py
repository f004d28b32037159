"""C for CPUs with AVX-512 VNNI: sources, their compilation, and calls into them."""
