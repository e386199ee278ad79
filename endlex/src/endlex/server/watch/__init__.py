"""Notice what needs a person: alerts, and the ways to send them."""
