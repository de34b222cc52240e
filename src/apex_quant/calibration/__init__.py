"""Calibration: an importance matrix from text, with what the experts and routers did."""
