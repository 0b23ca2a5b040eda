"""Attribution maps of a network, and a test of whether they mean anything."""
