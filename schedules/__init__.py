"""Kernels and schedules, one folder a target family."""
