"""Where a model will run: PyTorch as it is, compiled, ONNX Runtime, or OpenVINO.

- ``names``: what runtimes are called, and the packages that they need;
- ``onnx_files``: a network, or a single layer, as ONNX;
- ``layers``: how one layer is called, at any widths;
- ``calls``: a call of a network, or of an ONNX graph, in a runtime.
"""
