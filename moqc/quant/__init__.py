"""Quantization numerics: formats, packing, quantizers, allocators and the reference forward. Never imports tvm."""
