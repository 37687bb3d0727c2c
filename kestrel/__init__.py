"""Kestrel: keyword-spotting training recipes for efficient low-power hardware."""

__version__ = "0.1.0"
