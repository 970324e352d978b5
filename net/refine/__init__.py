"""Networks that refine class maps: affinity labels, affinity network, random walk. One file per method."""
