"""Layers: crossbar products and recurrent cells."""
