"""Calibration: text to token rows, inputs of linears to exact second moments."""
