"""Corpora, protocols and manifests: which clips there are and which split each belongs to."""
