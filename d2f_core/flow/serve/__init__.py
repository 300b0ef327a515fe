"""Online service: images over HTTP."""
