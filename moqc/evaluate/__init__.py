"""Loss, divergence and comparison of plans."""
