"""moqc: an ahead-of-time compiler for low-bit Mixture-of-Experts language models."""
__version__ = "0.1.0"
