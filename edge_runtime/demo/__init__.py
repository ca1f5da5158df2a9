"""The bundle that `edge-runtime demo` runs, made from `examples/models/moe` at int8."""
