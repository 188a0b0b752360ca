"""Ids of pages and who holds them: the two-level allocator and the host's page tables."""
