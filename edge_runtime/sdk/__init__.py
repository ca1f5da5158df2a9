"""The SDK: what a program that uses the runtime imports, as `from edge_runtime import …`."""
