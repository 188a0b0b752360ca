"""The faces that SGLang's scheduler talks to: allocator, prefix cache, admission."""
