"""Weight files of others: reading them (``reading``), renaming their tensors, loading them strictly with a report
(``loading``).

One file a format: ``pytorch`` (PyTorch zip and legacy, safetensors), ``mxnet``, ``caffe``. Nothing but tensors is ever
unpickled.
"""
