"""Device code in Triton: `recurrent` (decode and short blocks), `chunk` (prefill)."""
