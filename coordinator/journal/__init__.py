"""What must survive a crash: devices, join tokens, API keys, leases, accepted requests and every token before it is streamed."""
