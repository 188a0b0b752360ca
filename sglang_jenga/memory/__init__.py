"""Bytes: the one buffer and its views, as KV pools and pools of states."""
