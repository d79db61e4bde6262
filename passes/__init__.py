"""Compiler passes: one pass a file."""
