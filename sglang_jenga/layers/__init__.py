"""Layer types, one file each: what a request needs, where its bytes lie, what can be hit."""
