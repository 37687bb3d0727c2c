"""Quantisers and clipping ranges."""
