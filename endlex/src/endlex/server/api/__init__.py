"""Answer HTTP requests: routes, their guards, and the way in for journals."""
