"""x86 kernels: builders of scheduled TIR."""
