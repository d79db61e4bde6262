"""Families of machines that moqc compiles for, one a module; `moqc.targets` is their table."""
