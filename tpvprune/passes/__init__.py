"""Running a model over images, and watching it: no channel group is known here.

- ``running``, ``batches``, ``drawing``: modes and devices, unlabeled batches, a random draw;
- ``observer``, ``operations``: what layers read, and what torch's functions are called;
- ``positions``, ``patches``, ``moments``: activations as rows, and their sums;
- ``recomputation``, ``lockstep``, ``memory``: less memory, many chunks at the same pace;
- ``evaluation``, ``disagreement``, ``costs``: what a model gives, and what it takes;
- ``finite``, ``clock``: outputs that are no numbers; seconds and progress.
"""
