"""What must survive a crash: devices, join tokens, keys, leases, accepted requests and every token."""
