"""Measured times of packed matrices by target, for `moqc.schedules.kernel_times`."""
