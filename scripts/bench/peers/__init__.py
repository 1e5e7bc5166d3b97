"""Times of other programs on the shapes of `kind = "kernels"`, in the schema of nsa's result files."""
