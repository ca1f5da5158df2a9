"""Device code, in Triton's language: Python's syntax, not its types. Launched by the modules of the parent package."""
