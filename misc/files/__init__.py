"""File formats of a run: written atomically, read without executing code."""
