"""Arithmetic of a pool from a model's config, without torch or SGLang; the command line."""
