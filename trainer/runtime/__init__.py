"""What every part stands on: storage, leases, events, signals, the console and the connection to Ray."""
