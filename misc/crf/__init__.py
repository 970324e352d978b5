"""Dense CRF on a permutohedral lattice in tensor operations."""
