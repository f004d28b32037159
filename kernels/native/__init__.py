"""C for CPUs with AVX-512 VNNI, and AMX where there is one: sources, their compilation, and calls into them."""
