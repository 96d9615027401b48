"""Models in files: timm's and users' (``models``), pruned folders, the hub, exported programs.

- ``checkpoint``: a pruned folder; ``skeleton``: the module that its weights go into;
- ``hub``, ``downloads``: Hugging Face; ``export``: ONNX and pt2; ``int8``: ONNX in int8.
"""
