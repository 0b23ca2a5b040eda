"""The command-line jobs: each module is one job, run as a script or as a subcommand of ``training-notes``."""
