"""Predictions to figures, reports and heat maps."""
