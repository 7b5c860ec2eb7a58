"""Plugs for programs that people already use: one module per program, imported only when asked for."""
