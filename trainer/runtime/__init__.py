"""What every other package builds on: storage, leases, events, signals, the console and the connection to Ray."""
