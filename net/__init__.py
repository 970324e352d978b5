"""The networks, one file a method: layers, losses, map and published recipe."""
