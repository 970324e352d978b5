"""Names that are known without importing PyTorch."""

OWN = "own"
"""Name on the command line for the CAM network itself as the segmenter."""
