"""Flax modules: the only part of jaxptm that knows Flax. Modules are functions of (params, arrays, dropout key)."""
