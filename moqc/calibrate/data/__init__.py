"""Text for calibration when the user gives none; SOURCES.md names origins and licenses."""
