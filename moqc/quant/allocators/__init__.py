"""Bit allocation: a budget in stored bits -> a format for every unit. Pure functions of a `Problem`."""
