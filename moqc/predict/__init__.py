"""What a compilation would give, computed from the model's configuration alone."""
