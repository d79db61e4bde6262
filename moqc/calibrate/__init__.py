"""Runs the source model layer by layer on calibration text and streams statistics."""
