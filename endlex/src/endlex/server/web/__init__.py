"""Serve the dashboard: its pages, scripts and styles, and a run as one HTML file."""
