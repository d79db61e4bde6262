"""Configurations of well-known models, by name: what `moqc synth` takes instead of a file."""
