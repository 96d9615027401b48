"""Files: written whole or not at all (``atomic``), unfinished runs, digests, what paths may be."""
