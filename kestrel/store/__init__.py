"""Files that survive a kill: atomic writes, hashes, locks, HDF5 stores, checkpoints."""
