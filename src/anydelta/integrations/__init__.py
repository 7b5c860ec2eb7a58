"""Integrations into other programs: one module per program, imported on request."""
