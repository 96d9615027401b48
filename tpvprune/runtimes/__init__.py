"""Where a model will run: PyTorch as it is, compiled, ONNX Runtime, or OpenVINO."""
