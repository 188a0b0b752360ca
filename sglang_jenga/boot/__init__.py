"""The flag, what it refuses, every hook into SGLang, and the construction of the pools."""
