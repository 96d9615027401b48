"""Images from folders, archives and arrays to batches.

- ``sources``: what there is; ``loading``: the batches; ``preprocessing``: a model's own;
- ``training``, ``augmentation``: random views for training.
"""
