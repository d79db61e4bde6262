"""Kernels of plain work-groups, for OpenCL and WebGPU."""
