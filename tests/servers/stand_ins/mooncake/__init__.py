"""A stand-in for Mooncake, found where this folder's parent is on the path."""
