"""What runs on a device: it joins a coordinator, fetches its layers, and turns rows into rows or tokens."""
