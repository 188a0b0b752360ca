"""JENGA memory management for SGLang: one pool of large pages for every kind of layer."""

__version__ = "0.1.0"
