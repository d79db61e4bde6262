"""Front ends: a checkpoint or graph becomes an IRModule and a source of weights."""
