"""A server with OpenAI's API, and a page to chat in."""
