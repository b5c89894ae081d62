"""Training steps for a GPU, captured whole, that can skip the zeros."""
