"""Backbones: an image tower with its text tower, preprocessing and identity."""
