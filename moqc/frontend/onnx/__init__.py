"""The ONNX front end: graphs with com.microsoft MoE and QMoE nodes."""
