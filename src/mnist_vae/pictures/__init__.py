"""Every picture, and the explorer page."""
