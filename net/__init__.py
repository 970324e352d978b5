"""The networks, one file per method: layers, losses, class map and published recipe."""
