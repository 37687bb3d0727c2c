"""Trained models as integer models: the op set, the graph that runs them, and the lowering of each kind of network."""
