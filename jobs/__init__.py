"""The command lines: each module is one job, run as a script or as a subcommand of ``training-notes``."""
