"""The bundle that `edge-runtime demo` runs and its draft, made from `examples/models` at int8."""
