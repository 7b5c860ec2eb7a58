"""`anydelta tune`: launches of the Triton kernels, timed on this machine's GPU, kept in a table."""
