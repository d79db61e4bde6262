"""Speed: kernels on the shapes of real models, and whole artifacts."""
