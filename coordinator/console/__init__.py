"""The web console: static files, served by `coordinator.api.pages`."""
