"""Trained models to registered versions."""
