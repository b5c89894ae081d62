"""Training steps on a CPU that skip the zeros, and what else the package takes from them. Needs numba."""
