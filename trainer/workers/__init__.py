"""How workers are started, heard and lost: on a cluster, or on this machine alone."""
