"""A simulator per vendor: a real HTTP server on loopback that keeps machines, bills them, and misbehaves on command."""
