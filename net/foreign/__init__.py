"""Weights files of other projects: reading them (``reading``), renaming tensors and loading them strictly with a report
(``loading``).

One file per format: ``pytorch`` (PyTorch zip and legacy, safetensors), ``mxnet``, ``caffe``. Only tensors and plain
data are ever unpickled.
"""
