"""Loads and runs artifacts; needs neither torch nor the TVM compiler."""
