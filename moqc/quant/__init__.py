"""Quantization numerics: formats, packing, quantizers, allocators, the reference forward. Without tvm."""
