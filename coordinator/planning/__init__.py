"""Who runs which layers: values in, a Plan with its reasons out. Pure: no clock, no sockets."""
